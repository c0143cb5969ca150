import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network

settings.register_profile("trimtab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("trimtab")
