"""The device and number format that models get."""

import pytest
import torch

from speed_utils.models import DTYPE_VARIABLE, ModelError, device_and_dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="of CPUs")
@pytest.mark.parametrize(("is_fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_takes_bfloat16_where_it_computes_with_it(is_fast, expected, monkeypatch):
    monkeypatch.delenv(DTYPE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast, raising=False)
    assert device_and_dtype() == ("cpu", expected)


def test_the_environment_decides_first(monkeypatch):
    monkeypatch.setenv(DTYPE_VARIABLE, "bfloat16")
    assert device_and_dtype()[1] == torch.bfloat16
    monkeypatch.setenv(DTYPE_VARIABLE, "half")
    with pytest.raises(ModelError, match="SPEED_DTYPE='half' is none of bfloat16, float32"):
        device_and_dtype()
