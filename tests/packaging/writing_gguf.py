"""Write a GGUF file with a BatchNorm by the gguf package; run in the environment that has it."""

import gguf
import numpy as np

writer = gguf.GGUFWriter("bn.gguf", "bn")
for name in ("weight", "bias", "running_mean", "running_var"):
    writer.add_tensor(f"bn.{name}", np.linspace(1, 2, 8, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
