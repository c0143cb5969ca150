import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU

settings.register_profile("trimtab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("trimtab")
