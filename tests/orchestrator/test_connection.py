import pytest

from envs.errors import UserError
from orchestrator.connection import check_answers


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_one_sentence(address: str):
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address}: .*; start it, or"):
        check_answers(address)
