"""Loss spikes, worked by hand."""

from pretrain.training.loss_spikes import NEEDED, WINDOW, LossSpikes


def test_a_spike_is_above_a_multiple_of_the_median_of_the_latest_losses():
    spikes = LossSpikes(2.0)
    for loss in range(1, NEEDED + 1):
        assert not spikes.is_spike(1000.0)  # too few losses to compare with
        spikes.add(float(loss))
    assert not spikes.is_spike(9.0) and spikes.is_spike(9.01)  # the median of 1 … 8 is 4.5
    for _ in range(WINDOW):
        spikes.add(20.0)
    assert not spikes.is_spike(40.0) and spikes.is_spike(40.1) and len(spikes.losses) == WINDOW
