"""Mult-VAE^PR and Mult-DAE: autoencoders of users' histories that recommend items.

Liang, Krishnan, Hoffman and Jebara, *Variational Autoencoders for Collaborative Filtering*, WWW 2018 (arXiv
1802.05814), with every setting that only the authors' notebook tells. A user ``u`` with ``N_u`` interactions ``x_u``
has a latent ``z_u ~ N(0, I)`` and ``x_u ~ Multinomial(N_u, softmax(f(z_u)))``. The loss is the mean over users of

    -sum_i x_ui log softmax(f(z_u))_i  +  beta KL(q(z_u | x_u) || N(0, I)),    z_u ~ q(z_u | x_u)

with ``beta`` far below 1 and annealed from 0 ("partially regularised"). A new user needs no training: feed the history,
rank the logits.

What differs from the authors' code is speed and memory, not results: the history is never made dense (the first layer
gathers the rows of its matrix, which is stored transposed), and the likelihood neither builds the target nor the log
probabilities but turns the logits into their gradient in place.
"""

from lit_methods.vi.mult_vae.module import MultDAE, MultVAE

__all__ = ["MultDAE", "MultVAE"]
