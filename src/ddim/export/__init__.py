"""Networks, and whole sampling loops, in the formats of other runtimes: ONNX and OpenVINO.

    export_onnx(pipe, "mnist.onnx")                                    the network: sample, timestep -> prediction
    export_onnx(pipe, "digits.onnx", SamplingConfig(20))               the loop: latents -> images, in 20 steps
    export_openvino(pipe, "digits.xml", SamplingConfig(20, order=2))

A file is traced from the modules and the formulas that the library itself runs, computes in float32, and takes any
batch size. Its metadata say what it is (`ddim.export.metadata`).
"""

from ddim.export.files import check_target, export_onnx, export_openvino, target_files

__all__ = ["check_target", "export_onnx", "export_openvino", "target_files"]
