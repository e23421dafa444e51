"""What the processes of one server have in common."""

from engrampool_server.answer.shared_state import free_slot


def test_the_lowest_free_slot_is_taken():
    assert [free_slot(taken) for taken in ([], [0], [1, 0], [0, 2], [2, 1])] == [0, 1, 2, 1, 0]
