"""Model archives, the TorchServe endpoint and its client."""
