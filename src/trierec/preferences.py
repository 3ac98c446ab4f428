r"""S-DPO: titles that a user chose against several that were not, relative to a frozen reference model.

Shape key: B rows, n rejected titles of each.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def sdpo_loss(
    logp_theta_chosen: Tensor,
    logp_ref_chosen: Tensor,
    logp_theta_rejected: Tensor,
    logp_ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    r"""Softmax-DPO: how far the chosen title is ahead of all rejected ones together.

    .. math:: \ell = \log\Big(1 + \sum_{d} e^{\beta (s_d - s_w)}\Big), \qquad s = \log \pi_\theta - \log \pi_{ref}

    With one rejected title it is DPO, ``-log sigmoid(beta (s_w - s_d))``. Log-probabilities are sums over the
    tokens of a title, its terminator included, never means.

    Args:
        logp_theta_chosen: Of the chosen titles under the model (B,), nats.
        logp_ref_chosen: The same under the reference (B,).
        logp_theta_rejected: Of the rejected titles under the model (B, n), n >= 1.
        logp_ref_rejected: The same under the reference (B, n).
        beta: How much a nat counts, > 0.

    Returns:
        A loss for each row (B,), >= 0; log(1 + n) where model and reference agree.

    Source: S-DPO, arXiv:2406.09215, and its code, which takes exp and log one after the other and overflows.

    >>> import torch
    >>> zero, rejected = torch.zeros(1), torch.tensor([[-1.0, 0.5, 0.2]])
    >>> sdpo_loss(torch.ones(1), zero, rejected, torch.zeros(1, 3), beta=1.0)
    tensor([0.7844])
    """
    chosen = logp_theta_chosen - logp_ref_chosen
    ahead = logp_theta_rejected - logp_ref_rejected - chosen[:, None]
    return softplus((beta * ahead).logsumexp(1))
