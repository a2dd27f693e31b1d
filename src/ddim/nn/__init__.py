"""The parts of the network, and the operators they run on."""
