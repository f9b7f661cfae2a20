"""Nearest neighbours among features, and what several processes find."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lib import engine
from lib.evaluate import each_video, knn


def test_nearest_neighbours_by_hand_and_against_a_plain_loop():
    """The weights decide: one close neighbour beats two far ones."""
    train = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.8, -0.6, 0], [0, 0, 1]])
    scores = knn(train, torch.tensor([1, 0, 0, 2]), torch.tensor([[5.0, 0, 0]]), k=3)
    close = torch.tensor([1.0, 0.8, 0.8]).div(0.07).exp()
    expected = torch.stack([close[1] + close[2], close[0], close[0] * 0]) / close.sum()
    torch.testing.assert_close(scores[0], expected)
    torch.manual_seed(0)
    train, test, labels = torch.randn(50, 8), torch.randn(7, 8), torch.randint(5, (50,))
    labels[0] = 4
    found = knn(train, labels, test)
    for row, x in zip(found, test, strict=True):
        cosine = F.cosine_similarity(train, x[None])
        best = cosine.argsort(descending=True)[:20]
        votes = [cosine[best][labels[best] == c].div(0.07).exp().sum() for c in range(5)]
        torch.testing.assert_close(row, torch.stack(votes) / sum(votes))
    assert knn(train[:3], torch.tensor([0, 1, 1]), test).shape == (7, 2)  # fewer videos than k
    torch.testing.assert_close(knn(3 * train, labels, 7 * test), found)  # lengths do not count


def test_all_processes_get_what_each_of_them_found(tmp_path, monkeypatch):
    """The other process scored video 1, and could not read video 2. One file keeps both scores."""

    class Views:
        keys = ["0.avi", "1.avi", "2.avi"]

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(1, 2)

    of_all = lambda mine: [mine, ({"1.avi": torch.ones(1, 2)}, {2: "2.avi: broken"})]
    monkeypatch.setattr(engine, "of_all", of_all)
    monkeypatch.setattr(engine, "processes", lambda: 3)  # number 0 has the first video alone
    cfg, model = SimpleNamespace(precision="fp32", workers=0), torch.nn.Identity()
    path = tmp_path / "scores.pt"
    found, errors = each_video(model, Views(), cfg, torch.device("cpu"), path)
    assert found[0].tolist() == [[0.5, 0.5]] and found[1].tolist() == [[1, 1]] and len(found) == 2
    assert errors == {2: "2.avi: broken"}
    (kept,) = torch.load(path, weights_only=True).values()
    assert kept.keys() == {"0.avi", "1.avi"}
