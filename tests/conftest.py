import torch

torch.set_num_threads(1)  # most tensors here are tiny: more threads gain little, and lose much where other programs run
