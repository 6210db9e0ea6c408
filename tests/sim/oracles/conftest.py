"""Every oracle is asked about every engine."""

import pytest

from flashmoe.sim import ENGINES


@pytest.fixture(params=list(ENGINES))
def engine(request):
    """An engine's name."""
    return request.param
