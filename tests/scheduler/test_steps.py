def test_probe(make_engine):
    engine = make_engine()
    engine.add("a", 5, "A")
    engine.add("b", 20)
    for _ in range(4):
        print(engine.step())
    engine = make_engine(pipeline=1)
    engine.add("a", 5, "A", max_tokens=3)
    engine.add("b", 20)
    for _ in range(6):
        print(engine.step())
    assert 0
