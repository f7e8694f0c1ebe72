import pytest
from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def bridge(tiny_lm):
    return TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")
