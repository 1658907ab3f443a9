"""What tests of several processes look at: how each of them ended, and the checkpoints that they wrote."""

LOST = "another process of this run has ended"


def checkpoint_of(out, step):
    return out / "checkpoints" / f"step-{step:08d}"


def assert_all_end_with(results, code):
    assert [result["code"] for result in results] == [code] * len(results), results
    assert all("Traceback" not in result["error"] for result in results)
