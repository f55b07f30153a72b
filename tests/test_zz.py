from tests.conftest import Finished
def test_x(finished: Finished) -> None:
    for k,v in finished.contents().items(): print(k, len(v))
    assert finished.run()==0
    assert 0
