"""Laws of the network: the context is a set, and the names are those of the release."""

import pytest
import torch

from model.network.unet import UNet, UNetConfig
from model.recipes import imagenet_400m, laion_1p3b

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_downsampling=(1, 2),
    context_dim=24,
)


def _awake(config: UNetConfig) -> UNet:
    """A network whose zero-initialized layers are random too, or nothing would reach the output."""
    torch.manual_seed(0)
    net = UNet(config)
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return net.eval()


@torch.no_grad()
def test_the_order_of_context_vectors_does_not_matter():
    net = _awake(SMALL)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    context = torch.nn.functional.normalize(torch.randn(2, 5, 24), dim=-1)
    straight = net(x, t, context)
    shuffled = net(x, t, context[:, torch.tensor([3, 0, 4, 1, 2])])
    # Repeating every member leaves the distribution over members, and so the answer, as it is.
    twice = net(x, t, context.repeat(1, 2, 1))
    other = net(x, t, context.flip(0))
    torch.testing.assert_close(straight, shuffled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(straight, twice, rtol=1e-4, atol=1e-5)
    assert (straight - other).abs().max() > 1e-3


@pytest.mark.parametrize("recipe, millions", [(imagenet_400m, 400.92), (laion_1p3b, 1335.48)])
def test_networks_have_the_released_sizes(recipe, millions):
    with torch.device("meta"):
        net = UNet(recipe().unet)
    count = sum(weight.numel() for weight in net.parameters())
    assert round(count / 1e6, 2) == millions
    names = set(net.state_dict())
    assert len(names) == 688
    for name in (
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "middle_block.2.out_layers.3.weight",
        "output_blocks.0.0.skip_connection.weight",
        "output_blocks.5.2.conv.weight",
        "out.2.bias",
    ):
        assert name in names


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_keep_the_image_size(patch):
    net = UNet(UNetConfig(**{**SMALL.__dict__, "patch": patch}))
    x = torch.randn(1, 3, 16, 24)
    assert net(x, torch.tensor([5]), torch.randn(1, 4, 24)).shape == x.shape


def test_checkpointing_changes_no_gradient():
    plain, saved = _awake(SMALL), _awake(UNetConfig(**{**SMALL.__dict__, "checkpointing": True}))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([1, 500]), torch.randn(2, 4, 24)
    for net in (plain, saved):
        net.train()(x, t, context).square().mean().backward()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="model_channels = 40"):
        UNetConfig(model_channels=40)
    with pytest.raises(ValueError, match="divide by 2"):
        UNet(SMALL)(torch.randn(1, 3, 9, 8), torch.tensor([5]), torch.randn(1, 4, 24))
