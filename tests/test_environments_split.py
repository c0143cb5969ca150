from trimtab.environments.split import is_held_out


def test_one_task_in_five_is_held_out():
    share = sum(is_held_out(f"task {i}") for i in range(10_000)) / 10_000
    assert 0.19 < share < 0.22  # 52 of 256 values of one byte


def test_the_split_is_the_same_in_every_run():
    assert [i for i in range(20) if is_held_out(f"task {i}")] == [2, 3, 8, 11, 19]
