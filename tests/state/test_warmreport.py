from ckptcache.state.warmreport import WarmStartReport, grouped

LAYERS = [f"model.blocks.{i}.{name}" for i in range(12) for name in ("w", "b")]


def test_a_line_names_what_is_fresh_by_its_beginnings_and_in_order():
    fresh = tuple(name for name in LAYERS if name.split(".")[2] in ("9", "10", "11"))
    report = WarmStartReport(taken=tuple(n for n in LAYERS if n not in fresh), fresh=fresh)
    assert report.counts == "18 of 24 tensors taken, 0 resized, 6 fresh (blocks.9.*, blocks.10.*, blocks.11.*)"
    assert report.lines == ()


def test_a_tensor_whose_neighbours_are_taken_is_named_by_itself():
    assert grouped(["m.a.w", "m.b.w", "m.b.c"], ["m.a.w", "m.a.v", "m.b.w", "m.b.c"]) == ["m.a.w", "m.b.*"]
    assert grouped([], ["m.a"]) == []
    assert grouped(["m.a"], ["m.a"]) == ["m.a"]


def test_more_than_a_line_holds_is_counted():
    report = WarmStartReport(taken=("m.t",), fresh=tuple(f"m.{i}" for i in range(7)), resized={"m.r": ((2, 3), (4, 3))})
    assert report.counts == "1 of 9 tensors taken, 1 resized (r [2, 3] -> [4, 3]), 7 fresh (0, 1, 2, 3, and 3 more)"


def test_names_of_several_modules_begin_with_theirs():
    report = WarmStartReport(taken=("a.w",), fresh=("b.w", "b.v"))
    assert report.counts == "1 of 3 tensors taken, 0 resized, 2 fresh (b.*)"


def test_what_else_is_said():
    report = WarmStartReport(
        taken=("m.a", "m.b"),
        unused=("m.head.w", "m.head.b"),
        cast=dict.fromkeys(("m.a", "m.b"), ("bfloat16", "float32")),
        idle=("encodr.",),
    )
    assert report.lines == (
        "2 of these were saved as bfloat16, and are float32 now",
        "of what was saved, 2 went unused (head.*)",
        "key_map: no saved name is 'encodr.', or begins with it",
    )
