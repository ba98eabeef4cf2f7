from __future__ import annotations

import pytest
import torch

from repqvit import embedded
from shared_core import InputError


@torch.no_grad()
def test_the_timm_model_computes_what_the_packages_own_graph_computes():
    import onnxruntime

    model, decoder = embedded.dinov2_small(224)
    x = torch.randn(1, 3, 224, 224)
    session = onnxruntime.InferenceSession(embedded.onnx_bytes(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"input_image": x.numpy()})[0])[:, 0]
    found = decoder(model.forward_features(x)[:, 1:], 224)
    assert (found - expected).abs().max() < 1e-5


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(InputError, match="the image size must be a multiple of 14"):
        embedded.dinov2_small(100)
