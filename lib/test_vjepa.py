"""The claims of lib/vjepa.py, V-JEPA 2's pretraining, and of its encoder."""

import copy

import numpy as np
import pytest
import torch

import encoders
from lib import vjepa
from lib.common import to_tensor
from test_all import close, equal_states, refused


def test_rotary_attention_depends_on_relative_positions_alone():
    q, k = torch.randn(2, 32)
    place, other, move = torch.tensor([2, 1, 3]), torch.tensor([0, 3, 1]), torch.tensor([5, 2, 7])

    def score(at, to, **released):
        return torch.dot(*(vjepa.rotate(x, *vjepa.rotary_angles(p, 32, **released)) for x, p in ((q, at), (k, to))))

    close(score(place, other), score(place + move, other + move), atol=1e-5, rtol=1e-5)
    close(score(place, place), q @ k, atol=1e-5, rtol=1e-5)
    for axis in torch.eye(3).long():  # each of time, row and column matters
        assert (score(place, other) - score(place + axis, other)).abs() > 1e-3
    assert (score(place, place, released=True) - q @ k).abs() > 1e-3  # the slip in the released weights' positions


def test_block_masks_hide_boxes_and_what_is_hidden_is_not_seen():
    T, side, _ = grid = (4, 6, 6)
    for blocks, area, duration in [(1, 0.3, 1.0), (1, 0.3, 0.5), (2, 0.7, 0.5), (8, 0.15, 0.5)] * 5:
        context, target = vjepa.block_masks(7, grid, blocks, area, duration)
        assert context.shape[1] > 0 and context.shape[1] + target.shape[1] <= T * side**2
        for seen, hidden in zip(context.tolist(), target.tolist(), strict=True):
            assert len({*seen, *hidden}) == len(seen) + len(hidden)
        if blocks == 1:  # then all that the block covers, and all that it does not
            assert context.shape[1] + target.shape[1] == T * side**2
            for hidden in target:
                place = torch.stack([hidden // side**2, hidden // side % side, hidden % side])
                extent = (place.amax(1) - place.amin(1) + 1).tolist()
                assert extent[0] == duration * T and np.prod(extent) == len(hidden)
                assert extent[1] * extent[2] == pytest.approx(area * side**2, rel=0.3)
        assert len({tuple(sorted(hidden.tolist())) for hidden in target}) > 1  # each clip has its own


def test_the_context_encoder_never_sees_a_target_and_the_masked_predictor_knows_places_not_order():
    encoder, clips = encoders.build_encoder("vjepa_tiny"), torch.rand(2, 8, 3, 64, 64)
    context, target = vjepa.block_masks(2, encoder.grid, 2, 0.3, 0.5)
    before, all_before = encoder.vit(clips, context), encoder.vit(clips)
    for clip, hidden in zip(clips, target, strict=True):
        for place in hidden.tolist():
            t, row, column = place // 16, place // 4 % 4, place % 4
            clip[2 * t : 2 * t + 2, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 9.0
    assert torch.equal(encoder.vit(clips, context), before)
    changed = (encoder.vit(clips) - all_before).abs().sum(-1)
    assert (changed.take_along_dim(target, 1) > 1e-3).all()  # and these blocks are those places' pixels
    close(encoder.vit(clips, torch.arange(64).expand(2, -1)), encoder.vit(clips), atol=1e-5, rtol=1e-5)

    masked = vjepa.MaskedPredictor((4, 4, 4), 64, 48, depth=2, heads=2).eval()
    masked.mask_token.data.normal_()
    tokens, context, target = torch.randn(2, 9, 64), torch.arange(9).repeat(2, 1), torch.tensor([[20, 31, 47]] * 2)
    predicted, order = masked(tokens, context, target), torch.randperm(9)
    assert predicted.shape == (2, 3, 64) and (predicted[:, 0] - predicted[:, 1]).abs().max() > 1e-3
    again = masked(tokens[:, order], context[:, order], target.flip(1))
    close(again, predicted.flip(1), atol=1e-5, rtol=1e-5)


def test_the_target_encoder_follows_and_learns_nothing_by_itself(frames):
    results = []
    for momentum in (1.0, 0.5, 0.5):
        torch.manual_seed(0)
        encoder = encoders.build_encoder("vjepa_tiny")
        before = copy.deepcopy(encoder.vit.state_dict())
        results.append(encoder.fit(frames, steps=3, batch_size=2, momentum=momentum).vit.state_dict())
        assert not any(p.requires_grad for p in encoder.parameters())
        pixels = encoder.standardised(to_tensor(frames))
        assert pixels.mean(0).abs().max() < 1e-4 and pixels.std(0).max() < 1
    assert equal_states(results[0], before) and equal_states(results[1], results[2])
    assert not torch.equal(results[1]["embed.weight"], before["embed.weight"])


def test_a_collapse_is_measured_and_ends_the_fit(frames):
    once, thrice = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for tokens, expected in ((torch.randn(4000, 3, 1) * once, 1), (torch.randn(20_000, 1, 4) * thrice, 3)):
        std, rank = encoders.collapse_measures(tokens)
        assert std == pytest.approx(0.75, rel=0.05) and rank == pytest.approx(expected, abs=0.01)
    constant = torch.randn(1, 3, 4).expand(50, -1, -1)  # places differ, frames do not
    assert encoders.collapse_measures(constant)[0] == pytest.approx(0, abs=1e-6)
    encoder = encoders.build_encoder("vjepa_tiny")
    for parameter in encoder.vit.embed.parameters():
        parameter.zero_()
    with refused("vjepa_tiny has collapsed: .* try another --seed"):
        encoder.fit(frames, steps=1, batch_size=2)
