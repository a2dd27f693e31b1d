"""The modules of the U-Net, and the operators that they run on."""
