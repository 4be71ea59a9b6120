"""The end of the account."""


def test_everything_was_used(unused_arrays):
    """No stored array is passed over in silence."""
    assert not unused_arrays, f"{len(unused_arrays)} stored arrays were not used: {', '.join(unused_arrays[:5])} ..."
