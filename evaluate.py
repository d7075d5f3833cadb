"""From a checkpoint to numbers, pictures and one page: the last stage, and the only one that looks at true factors.

    python evaluate.py out/shapes3d-laptop/ckpt.pt              # everything, at the paper's sample counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --quick      # under a minute, at smaller counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --only factorvae,mig
    python evaluate.py epoch=99.ckpt --released shapes3d        # weights of the paper's released code, or EncDiff's

prints a table with the paper's numbers beside ours and writes metrics.json, a PNG per figure and index.html (open it
in a browser; it needs no network) to the folder eval beside the checkpoint, or to --out.

The metrics ask one question in many ways: does each latent unit follow one factor, and each factor one unit? They are
plain functions that know nothing of this project: score codes of your own with them, for instance
    evaluate.mig(lambda idx: my_codes[idx], factor_sizes=[10, 10, 10, 8, 4, 15])

Reading order: codes (images to one number per unit), metrics, figures, report, released weights, main.
"""

import base64
import html
import inspect
import io
import json
import math
import re
import string
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data
import train
from data import UserError
from unet import ddim

BATCH = 500  # images that go through the extractor at once
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

# ---- Codes: from images to one number per unit ----------------------------------------------------------------------


def fit_pca(c):
    """One-component PCA of every unit at once. c: (n, N, D). Returns mean and direction, each (N, D) float32.

    All metrics but FID see a unit as one number (section 4.1). A unit IS one number under an MLP, so little is lost.
    """
    mean = c.double().mean(0)  # (N, D)
    x = c.double() - mean  # (n, N, D)
    cov = torch.einsum("nud,nue->ude", x, x) / len(c)  # (N, D, D)
    direction = torch.linalg.eigh(cov).eigenvectors[..., -1]  # (N, D), of the largest eigenvalue
    # An eigenvector's sign is free. Fix it, or the same model would be drawn left to right one day and back the next.
    sign = direction.gather(1, direction.abs().argmax(1, keepdim=True)).sign()
    return mean.float(), (direction * sign).float()


def project(c, pca):
    """Units c (n, N, D) to their coordinates along the first component, (n, N)."""
    mean, direction = (t.to(c.device) for t in pca)
    return ((c - mean) * direction).sum(-1)  # (n, N)


class Codes:
    """encode(idx) for the metrics: every image is encoded once, when it is first asked for, and remembered.

    Holds one float32 array (images, N), 38 MB for Shapes3D and 20 units, however much the metrics ask for.
    """

    def __init__(self, model, ds, pca):
        self.model, self.ds, self.pca = model, ds, pca
        self.table = np.zeros((len(ds), len(pca[0])), np.float32)  # (images, N)
        self.known = np.zeros(len(ds), bool)  # which rows of the table are filled

    def __call__(self, idx):
        """idx int64 (B,) -> float32 (B, N)."""
        new = np.unique(idx[~self.known[idx]])  # metrics draw with replacement
        parts = [new[i:i + BATCH] for i in range(0, len(new), BATCH)]
        # A bar only where there is something to wait for; None means: if this is a terminal.
        silent = None if len(parts) > 10 else True
        for part in tqdm(parts, f"encoding {len(new):,} images", leave=False, disable=silent):
            # The PCA runs on the model's device: 32 times fewer numbers come back from it.
            c = self.model.units(self.ds.images(torch.from_numpy(part)))  # (B, N, D)
            self.table[part] = project(c, self.pca).cpu().numpy()
            self.known[part] = True
        return self.table[idx]

# ---- Metrics --------------------------------------------------------------------------------------------------------
# Common to all: encode(idx int64 (B,)) -> float (B, U), one number per unit; idx counts the full grid of factor_sizes
# in row-major order (the first factor changes slowest). K factors, U units, natural logarithms. Samples draw every
# factor independently and with replacement, train before test, from one generator made of `seed`. What one should know
# about a score (no active unit, an undefined value) is said by a warning; NaN or Inf in codes is a ValueError.
#
# Scores may disagree, because they ask different things. FactorVAE asks only which unit is the most silent: a unit that
# leaks a bit of a second factor still wins its votes, while DCI charges for each leak. Both let several units share a
# factor; MIG does not.
#
# A factor of one value can be told from nothing. It is left out; its size is 1, so the indices stay right without it.


def grid(factor_sizes, at_least=1):
    """Sizes of the factors that vary, int64 (K,). ValueError if there are fewer than at_least."""
    sizes = np.array([size for size in factor_sizes if size != 1], dtype=np.int64)
    if len(sizes) < at_least or (sizes < 1).any():
        raise ValueError(f"factor_sizes {list(factor_sizes)}: at least {at_least} factors of two or more values needed")
    return sizes


def finite(codes):
    """codes (n, U), unchanged. ValueError naming the units that hold NaN or Inf."""
    bad = np.flatnonzero(~np.isfinite(codes).all(0))  # one bad number spoils its whole unit
    if len(bad):
        raise ValueError(f"the codes of unit {', '.join(map(str, bad))} hold NaN or Inf; metrics need finite codes")
    return codes


def encode_factors(encode, factors, sizes):
    """Codes float64 (n, U) of factors int64 (n, K). ValueError if encode gives another shape, NaN or Inf."""
    codes = encode(np.ravel_multi_index(factors.T, sizes))  # row-major, first factor slowest
    codes = np.asarray(codes.detach().cpu() if torch.is_tensor(codes) else codes, dtype=np.float64)
    if codes.ndim != 2 or len(codes) != len(factors):
        raise ValueError(f"encode gave shape {codes.shape} for {len(factors)} indices; expected ({len(factors)}, U)")
    return finite(codes)


def sample(encode, sizes, n, rng, units=1):
    """n random codes (n, U) and their factors int64 (n, K). ValueError if U < units or some factor does not vary."""
    factors = rng.integers(0, sizes, size=(n, len(sizes)))  # (n, K)
    codes = encode_factors(encode, factors, sizes)  # (n, U)
    if codes.shape[1] < units:
        raise ValueError(f"{codes.shape[1]} unit: this metric compares units with each other and needs {units}")
    if (factors == factors[:1]).all(0).any():
        raise ValueError(f"a factor takes one value in all of {n} samples: draw more")
    return codes, factors


def gap(scores):
    """Best minus second best unit. scores: (U, ...) -> (...)."""
    return np.sort(scores, axis=0)[-1] - np.sort(scores, axis=0)[-2]


def entropy(p, axis):
    """Entropy of distributions along an axis, in nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis)


def factor_vae(encode, factor_sizes, seed=0, n_variance=10_000, n_train=10_000, n_test=5_000, batch=64):
    """FactorVAE score (reference 31), 0 to 1: hold one factor fixed and see which unit falls silent.

    A vote: fix a random factor k at a random value in `batch` samples; the unit of least variance, relative to its
    variance over everything, gets a vote for k. Training votes name each unit after its most frequent factor; the score
    is how often that name is right on new votes. Units of sd < 0.05 take no part; if none is left the score is 0.
    """
    sizes, rng = grid(factor_sizes), np.random.default_rng(seed)
    overall = sample(encode, sizes, n_variance, rng)[0].var(0, ddof=1)  # (U,)
    # The threshold is absolute, as in the reference: a good code that is scaled down far enough scores 0.
    active = np.sqrt(overall) >= 0.05  # (U,)
    if not active.any():
        warnings.warn("FactorVAE: no active unit (all have sd < 0.05), so the score is 0")
        return 0.0

    def vote(n):
        """Votes as a table (A, K): how often factor k was fixed and active unit d was the most silent."""
        table = np.zeros((active.sum(), len(sizes)), np.int64)  # (A, K)
        chunk = max(1, 2 ** 16 // batch)  # many votes per call of encode, yet some 10 MB at once
        for m in [min(chunk, n - start) for start in range(0, n, chunk)]:
            k = rng.integers(len(sizes), size=m)  # (m,) which factor is fixed
            factors = rng.integers(0, sizes, size=(m, batch, len(sizes)))  # (m, batch, K)
            factors[np.arange(m), :, k] = factors[np.arange(m), 0, k][:, None]  # the first sample sets the value
            codes = encode_factors(encode, factors.reshape(m * batch, -1), sizes)  # (m*batch, U)
            local = codes.reshape(m, batch, -1)[:, :, active].var(1, ddof=1)  # (m, A)
            np.add.at(table, ((local / overall[active]).argmin(1), k), 1)
        return table

    # argmax takes the lowest factor where votes tie, and factor 0 for a unit that got none.
    name = vote(n_train).argmax(1)  # (A,)
    return float(vote(n_test)[np.arange(len(name)), name].sum() / n_test)


def fit_trees(task):
    """One gradient-boosted classifier from codes to one factor; runs in a process of its own.

    task: number, train codes and labels, test codes and labels, seed. Returns number, importances (U,), test accuracy.
    """
    number, x, y, x_test, y_test, seed = task
    # The reference sets no seed. It only decides between splits that are equally good.
    model = GradientBoostingClassifier(random_state=seed).fit(x, y)
    return number, model.feature_importances_, float(model.score(x_test, y_test))


def fit_all_trees(tasks, jobs, desc):
    """fit_trees for all tasks in `jobs` processes (None: one per core), with a bar. Results in the tasks' order."""
    # A fit grows one tree per class and stage, so its time goes with classes times samples. The longest first: then
    # no process is left alone with a long one at the end.
    cost = [len(y) * len(np.unique(y)) for _, _, y, _, _, _ in tasks]
    results, parallel = [None] * len(tasks), joblib.Parallel(
        min(jobs or joblib.cpu_count(), len(tasks)), return_as="generator_unordered", batch_size=1)
    with tqdm(total=sum(cost), desc=desc, leave=False, disable=None, unit=" labels", unit_scale=True) as bar:
        for number, *result in parallel(joblib.delayed(fit_trees)(tasks[i]) for i in np.argsort(cost)[::-1]):
            results[number] = result
            bar.update(cost[number])
    return results


def dci(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000, jobs=None):
    """DCI (reference 14): who is asked for what? Returns dict: disentanglement, completeness, informativeness, 0 to 1.

    Boosted trees predict each factor from all units; R[u, k] is the importance of unit u for factor k. Disentangled: a
    unit is important for one factor. Complete: a factor needs one unit. Informative: the trees' test accuracy.
    Scores depend strongly on the sample counts: never compare across counts. A badly predicted factor weighs as much as
    a well predicted one, as in the reference. ValueError for fewer than two factors or units.
    """
    sizes, rng = grid(factor_sizes, at_least=2), np.random.default_rng(seed)
    x, y = sample(encode, sizes, n_train, rng, units=2)
    x_test, y_test = sample(encode, sizes, n_test, rng)
    tasks = [(k, x, y[:, k], x_test, y_test[:, k], seed) for k in range(len(sizes))]
    importances, accuracies = zip(*fit_all_trees(tasks, jobs, "DCI"))
    # Importances sum to 1 per factor, so every factor has the same say.
    R = np.stack(importances, 1)  # (U, K)
    if R.sum() == 0:  # no tree found anything to split, so all units are equally important
        R = np.ones_like(R)

    def certainty(axis):
        """1 - entropy in units of its largest value. A row or column of zeros becomes uniform: 0."""
        p = (R + 1e-11) / (R + 1e-11).sum(axis, keepdims=True)
        return 1 - entropy(p, axis) / np.log(R.shape[axis])
    return {"disentanglement": float((certainty(1) * R.sum(1)).sum() / R.sum()),
            "completeness": float(certainty(0).mean()), "informativeness": float(np.mean(accuracies))}


def mutual_information(codes, factors, bins=20):
    """Mutual information of each unit, cut into bins, with each factor, and the factors' entropies; in nats.

    codes (n, U), factors int64 (n, K) -> (U, K), (K,). Plug-in estimates: unrelated pairs get (bins-1)(values-1)/2n.
    """
    n, U = codes.shape
    # Bins of equal widths between least and largest value. Left edges only, or the largest would get one of its own.
    labels = np.stack([np.digitize(unit, np.histogram(unit, bins)[1][:-1]) - 1 for unit in codes.T], 1)  # (n, U)
    one_hot = np.eye(bins, dtype=np.float32)[labels].reshape(n, U * bins)  # (n, U*bins)
    mi, h = np.zeros((U, factors.shape[1])), np.zeros(factors.shape[1])  # (U, K), (K,)
    for k, y in enumerate(factors.T):
        # A product of one-hot matrices counts all pairs (bin, value) of all units at once.
        joint = one_hot.T @ np.eye(y.max() + 1, dtype=np.float32)[y]  # (U*bins, values)
        joint = joint.reshape(U, bins, -1).astype(float) / n  # (U, bins, values)
        h[k] = entropy(joint[0].sum(0), 0)  # the factor is the same for every unit
        mi[:, k] = entropy(joint.sum(2), 1) + h[k] - entropy(joint, (1, 2))  # H(u) + H(k) - H(u, k)
    return np.where(mi > 1e-12, mi, 0), h  # no information may come out as +-1e-16


def mig(encode, factor_sizes, seed=0, n_train=10_000, bins=20):
    """Mutual information gap (reference 9), 0 to 1: mean over factors of (best - second best unit's MI) / H(factor).

    It asks that exactly one unit knows a factor; a perfect copy of the best unit makes it 0. ValueError for one unit.
    """
    mi, h = mutual_information(*sample(encode, grid(factor_sizes), n_train, np.random.default_rng(seed), units=2), bins)
    return float((gap(mi) / h).mean())


def modularity(encode, factor_sizes, seed=0, n_train=10_000, bins=20):
    """Modularity (reference 49), 0 to 1: does a unit know one factor? Mean over ALL units; it does not mind copies.

    Per unit 1 - (sum over the other factors of MI^2) / ((K-1) max MI^2), and 0 for a unit that knows nothing.
    ValueError for fewer than two factors.
    """
    sizes = grid(factor_sizes, at_least=2)
    squared = mutual_information(*sample(encode, sizes, n_train, np.random.default_rng(seed)), bins)[0] ** 2  # (U, K)
    best = squared.max(1)  # (U,)
    others = (squared.sum(1) - best) / np.where(best > 0, best, 1) / (len(sizes) - 1)  # (U,), 0 to 1
    return float(np.where(best > 0, 1 - others, 0).mean())


def sap(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000):
    """SAP score (reference 33), 0 to 1: a linear classifier per factor and unit, on that unit's one number alone; mean
    over factors of best minus second best unit's test accuracy. ValueError for one unit."""
    sizes, rng = grid(factor_sizes), np.random.default_rng(seed)
    x, y = sample(encode, sizes, n_train, rng, units=2)
    x_test, y_test = sample(encode, sizes, n_test, rng)

    def accuracy(u, k):
        # Numbers go in as they are, so the penalty C makes this metric depend on a unit's scale, as in the reference.
        model = LinearSVC(C=0.01, class_weight="balanced", dual="auto", random_state=seed)
        return model.fit(x[:, [u]], y[:, k]).score(x_test[:, [u]], y_test[:, k])
    # Threads are enough: the solver is C code that lets others run meanwhile.
    pairs = [joblib.delayed(accuracy)(u, k) for u in range(x.shape[1]) for k in range(len(sizes))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        table = np.array(joblib.Parallel(-1, prefer="threads")(pairs)).reshape(x.shape[1], -1)  # (U, K)
    return float(gap(table).mean())


def infomec(encode, factor_sizes, seed=0, n_train=10_000):
    """InfoMEC (reference 24). Returns dict: infom (modularity), infoc (compactness), infoe (explicitness).

    Mutual information by nearest neighbours, without bins. Units whose inter-quartile range is at most a tenth of the
    largest take no part in infom and infoc. infom counts an active unit of no information as 0, infoc is nan for
    fewer than two active units; a warning says so. ValueError for fewer than two factors.
    """
    sizes, rng = grid(factor_sizes, at_least=2), np.random.default_rng(seed)
    x, y = sample(encode, sizes, n_train, rng)  # (n, U), (n, K)
    K = len(sizes)
    spread = np.subtract(*np.percentile(x, [75, 25], axis=0))  # (U,)
    # This looks at scale, not information: noise of ordinary spread stays, a unit whose middle half is one value goes.
    active = spread > spread.max() / 10  # (U,)
    A = int(active.sum())
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)  # a constant unit becomes zeros
    nmi = np.zeros((K, A))
    for k in range(K if A else 0):
        h = entropy(np.bincount(y[:, k]) / n_train, 0)  # in nats, as the estimator
        # The estimator adds noise of 1e-10 so that no two values are equal: that is what its random_state is for.
        nmi[k] = mutual_info_classif(x[:, active], y[:, k], n_neighbors=10, random_state=seed) / h  # (A,)

    def error(x, y):
        """Training log loss of a linear classifier without penalty (C = inf), at most 100 steps as in the reference."""
        # One BLAS thread: products of 20 columns are too small to share, and where other programs run too, threads
        # that wait for each other made this fit 150 times slower.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            return log_loss(y, LogisticRegression(C=np.inf, class_weight="balanced").fit(x, y).predict_proba(x))

    def above_chance(share, n):
        return float((share - 1 / n) / (1 - 1 / n))

    infom, infoc, total = 0.0, math.nan, nmi.sum(0)  # total: (A,)
    if A == 0 or (total == 0).any():
        warnings.warn(f"InfoM: {A} active units, {(total == 0).sum()} of them without information, which count as 0")
    if A:
        share = np.where(total > 0, nmi.max(0) / np.where(total > 0, total, 1), 1 / K)  # (A,)
        infom = above_chance(share.mean(), K)
    if A > 1:
        infoc = above_chance((nmi.max(1) / (nmi.sum(1) + 1e-6)).mean(), A)
    else:
        warnings.warn(f"InfoC: undefined for {A} active unit(s), reported as nan")
    # What the units save of the error that one makes without them, looking at zeros.
    infoe = np.mean([1 - error(x, y[:, k]) / error(0 * x, y[:, k]) for k in range(K)])
    return {"infom": infom, "infoc": infoc, "infoe": float(infoe)}


def gbt_efficiency(encode, factor_sizes, seed=0, n_test=5_000, jobs=None):
    """Are few labels enough (Table 5)? Test accuracy of trees from 10,000 labels, and the share left at 1,000 and 100.

    Returns dict: acc, acc_1000_ratio, acc_100_ratio; ratios of the means over factors. Each n has fresh samples.
    """
    sizes, rng, tasks = grid(factor_sizes), np.random.default_rng(seed), []
    for n in (10_000, 1_000, 100):
        x, y = sample(encode, sizes, n, rng)
        x_test, y_test = sample(encode, sizes, n_test, rng)
        tasks += [(len(tasks) + k, x, y[:, k], x_test, y_test[:, k], seed) for k in range(len(sizes))]
    accuracies = [accuracy for _, accuracy in fit_all_trees(tasks, jobs, "sample efficiency")]
    acc, acc_1000, acc_100 = np.reshape(accuracies, (3, -1)).mean(1)  # (3, K) -> (3,)
    return {"acc": float(acc), "acc_1000_ratio": float(acc_1000 / acc), "acc_100_ratio": float(acc_100 / acc)}


def stepped_auroc(codes, attributes, step):
    """AUROC of every unit for every attribute, from a few thresholds; the larger of both directions. Returns (U, A)."""
    low, high = codes.min(0), codes.max(0)  # (U,)
    result = np.full((codes.shape[1], attributes.shape[1]), 0.5)  # (U, A)
    # A unit of small range counts as a guess; like the thresholds' steps, this is the reference's rule.
    for u in np.flatnonzero(high - low > 0.2):
        thresholds = low[u] + np.arange(0, 1 + step / 2, step) * (high[u] - low[u])  # (T,)
        above = (codes[:, u] >= thresholds[:, None]).astype(float)  # (T, n)
        tpr = above @ attributes / np.maximum(attributes.sum(0), 1)  # (T, A)
        fpr = above @ (1 - attributes) / np.maximum((1 - attributes).sum(0), 1)  # (T, A)
        areas = []
        for t, f in ((tpr, fpr), (1 - tpr, 1 - fpr)):  # the second expects the attribute below the threshold
            # Rectangles as high as their right end: more than the area under the curve.
            areas.append((np.sort(t, 0)[1:] * np.diff(np.sort(f, 0), axis=0)).sum(0))  # (A,)
        result[u] = np.maximum(*areas)
    return result


def exact_auroc(codes, attributes):
    """AUROC (U, A), the larger of both directions: how often a sample with the attribute ranks above one without."""
    pairs = attributes.sum(0) * (1 - attributes).sum(0)  # (A,)
    # The sum of ranks of the samples with the attribute, less its least value, counts the pairs they win; ties half.
    wins = rankdata(codes, axis=0).T @ attributes - attributes.sum(0) * (attributes.sum(0) + 1) / 2  # (U, A)
    area = np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)  # (U, A), a guess where there is no pair
    return np.maximum(area, 1 - area)


def tad(codes, attributes, step=0.1):
    """Total AUROC difference (reference 70, Table 2), for images that have attributes and form no grid.

    codes: (n, U); attributes: (n, A) of 0 and 1. An attribute is captured if a unit predicts it (AUROC at least 0.75)
    and no other attribute gives it away (mutual information at most 0.2 of its own entropy). TAD sums best minus second
    best unit's AUROC over captured attributes. Returns dict: tad, captured (how many), and both by exact AUROCs
    (tad_exact, captured_exact): the coarse thresholds overestimate, most of all for heavy-tailed units. ValueError for
    NaN, fewer than two units, or other labels than 0 and 1.
    """
    codes, attributes = finite(np.asarray(codes, dtype=np.float64)), np.asarray(attributes)
    if codes.shape[1] < 2 or len(codes) != len(attributes) or not np.isin(attributes, (0, 1)).all():
        raise ValueError(f"codes {codes.shape}, attributes {attributes.shape}: expected (n, U >= 2) and (n, A) of 0, 1")
    attributes = attributes.astype(np.float64)
    both = np.stack([1 - attributes, attributes])  # (2, n, A)
    joint = np.einsum("xna,ynb->abxy", both, both, optimize=True) / len(codes)  # (A, A, 2, 2), of every pair
    own = entropy(both.mean(1), 0)  # (A,)
    shared = own[:, None] + own - entropy(joint, (2, 3))  # (A, A)
    np.fill_diagonal(shared, 0)  # an attribute may give itself away
    clean = (shared.max(1) <= 0.2 * own) & (own > 0)  # an attribute that all have, or none, cannot be captured
    result = {}
    for ending, auroc in (("", stepped_auroc(codes, attributes, step)), ("_exact", exact_auroc(codes, attributes))):
        captured = clean & (auroc.max(0) >= 0.75)
        result |= {f"tad{ending}": float(gap(auroc)[captured].sum()), f"captured{ending}": int(captured.sum())}
    return result


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two Gaussians, FID's formula: |mu1-mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2).

    mu: (D,), cov: (D, D), symmetric, no negative eigenvalue; zero ones (fewer images than features) are fine.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(v, dtype=np.float64) for v in (mu1, cov1, mu2, cov2))
    # cov1 cov2 is not symmetric, but it has the eigenvalues of root cov2 root (with root root = cov1), which is.
    values, vectors = np.linalg.eigh(cov1)  # (D,), (D, D)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # (D, D)
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()  # of (cov1 cov2)^1/2
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace)


def load_inception(data_dir, device):
    """The Inception network that FID is measured with, or None (and one line) if its file is not in data_dir.

    A copy of the original FID's network as TorchScript, published with StyleGAN2-ADA. A TorchScript file is a program:
    take it from that address only. UserError if the file is damaged.
    """
    path = Path(data_dir) / INCEPTION.rsplit("/", 1)[1]
    if not path.is_file():
        print(f"FID left out: {path} is not there; put the file there (91 MB) from {INCEPTION}", flush=True)
        return None
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable TorchScript file, expected the one from {INCEPTION}") from error


@torch.no_grad()
def fid(model, ds, inception, n, steps, seed=0):
    """Frechet Inception Distance (reference 20) of n generated against n real images; lower is better.

    Paper: does not say what its samples are conditioned on. Here: the aligned units of n images of the dataset, which
    are not among the n real ones where the dataset is large enough.
    """
    if n < 2_048:
        warnings.warn(f"FID of {n:,} images: far too high below 2,048, the number of features; quote no such value")
    draw, moments = torch.Generator().manual_seed(seed), []
    order = torch.randperm(len(ds), generator=draw)
    for name, idx in (("real", order[:n]), ("generated", order[-n:])):
        features = []
        for part in tqdm(idx.split(64), f"FID, {name} images", leave=False, disable=None):
            images = ds.images(part)  # (B, 3, 64, 64)
            if name == "generated":
                images = model.sample(model.dyga.align(model.units(images)), model.noise(len(part), draw), steps)
            features.append(inception(images, return_features=True).cpu().double())  # (B, 2048)
        features = torch.cat(features).numpy()  # (n, 2048)
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    return frechet_distance(*moments)


def separation(dyga, c, labels, active):
    """How well anchors separate attributes (Figure 1), before alignment (c) and after it (c~). Quote purity beside
    chance: the margin looks at no labels, it says how far alignment clears the space between anchors.

    c: units (n, N, D); labels: int64 (n, N), the value of each unit's best factor; active: bool (N,). A sample belongs
    to the anchor of highest responsibility. Purity: the share of samples that have their anchor's most frequent value.
    Pure: the share of anchors whose own purity is at least 0.9. Margin: 1 - (distance to the own anchor) / (distance to
    the nearest other one), 1 on an anchor, 0 half-way between two. All are means over active units. Alignment moves a
    sample towards its own anchor, so it should raise the margin; purity asks only which anchor that is, and hardly
    changes. Chance: the purity of one single anchor. Returns dict; {} without anchors or without active units.
    """
    if not dyga.mask[active].any():
        return {}
    N, K = dyga.mask.shape

    def count(owner, K):
        """Samples of active units by anchor and value, (A, K, values). owner: (n, N)."""
        counts = np.zeros((N, K, labels.max() + 1))  # (N, K, values)
        np.add.at(counts, (np.arange(N), owner, labels), 1)
        return counts[active]
    numbers = {"chance": count(np.zeros_like(labels), 1).max(2).mean() / len(c)}
    for name in ("before", "after"):
        owners, margins = [], []
        for part in c.to(dyga.anchors.device).split(BATCH):
            part = dyga.align(part) if name == "after" else part  # (B, N, D)
            owner = dyga.responsibilities(part).argmax(-1, keepdim=True)  # (B, N, 1)
            distance = torch.cdist(part.transpose(0, 1), dyga.anchors).transpose(0, 1)  # (B, N, K)
            distance = distance.masked_fill(~dyga.mask, math.inf)  # absent anchors
            # A unit's only anchor has no other one: infinitely far, a margin of 1.
            other = distance.scatter(2, owner, math.inf).amin(-1).clamp(min=1e-12)  # (B, N)
            owners.append(owner[..., 0].cpu())
            # A sample may lie nearer to another anchor than to its own, whose Gaussian is wider; that counts as 0.
            margins.append((1 - distance.gather(2, owner)[..., 0] / other).clamp(min=0).cpu())  # (B, N)
        counts = count(torch.cat(owners).numpy(), K)  # (A, K, values)
        top, size = counts.max(2), counts.sum(2)  # (A, K)
        pure = ((top >= 0.9 * size) & (size > 0)).sum(1) / (size > 0).sum(1)  # (A,)
        numbers |= {f"purity_{name}": top.sum() / size.sum(), f"pure_{name}": pure.mean(),
                    f"margin_{name}": torch.cat(margins)[:, active].mean()}
    return {name: float(value) for name, value in numbers.items()}


def mean_deltas(dyga, c):
    """How far alignment moves units c (n, N, D): mean delta of equation 6, and by the released code's formula.

    The released code has ONE delta for a batch (512, the paper's) and c_j + 1e-6 as denominator, so a few c_j near 0
    make it vanish. Returns dict; {} without anchors.
    """
    if not dyga.mask.any():
        return {}
    c = c[:5_000].to(dyga.anchors.device)
    batch = c[:512]  # (B, N, D)
    owner = dyga.responsibilities(batch).argmax(-1)  # (B, N)
    mu = dyga.anchors[torch.arange(c.shape[1], device=c.device), owner]  # (B, N, D)
    released = dyga.lam * (-((batch - mu) / (batch + 1e-6)).abs().mean()).exp()  # one number
    return {"mean_delta": dyga.delta(c).mean().item(), "released_delta": released.item(), "lambda": dyga.lam}

# ---- Figures: each function returns a PIL.Image ---------------------------------------------------------------------


class Probe:
    """A random sample of images and what the model makes of it, shared by the figures.

    idx (n,); c (n, N, D) before alignment; factors int64 (n, F); codes (n, N), their PCA coordinates; active
    bool (N,), FactorVAE's rule; nmi (F, N), mutual information of factor and unit over the factor's entropy; best:
    shown factor -> unit of most nmi; groups: shown factor -> its best unit and all active units that know none better.
    """

    def __init__(self, model, ds, n, seed):
        self.idx = torch.from_numpy(np.random.default_rng(seed).permutation(len(ds))[:n])  # (n,), without repeats
        parts = tqdm(self.idx.split(BATCH), f"units of {n:,} images", leave=False, disable=None)
        self.c = torch.cat([model.units(ds.images(part)).cpu() for part in parts])  # (n, N, D)
        bad = (~self.c.isfinite()).any(-1).any(0).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"units {bad} of this checkpoint are NaN or Inf: its training diverged; train it again")
        self.names, self.factors = ds.factor_names, ds.factors(self.idx).cpu().numpy()  # (n, F)
        self.pca = fit_pca(self.c)  # (N, D) twice
        self.codes = project(self.c, self.pca).numpy()  # (n, N)
        self.active = self.codes.std(0, ddof=1) >= 0.05  # (N,)
        mi, h = mutual_information(self.codes, self.factors)  # (N, F), (F,)
        self.nmi = (mi / np.maximum(h, 1e-12)).T  # (F, N)
        # Shown: the factors that some unit knows best, at most 8 (CelebA has 40), in the dataset's order.
        self.best = {int(f): int(self.nmi[f].argmax()) for f in np.sort(np.argsort(-self.nmi.max(1))[:8])}
        self.labels = [f"{self.names[f]}: unit {u}" for f, u in self.best.items()]
        favourite = self.nmi.argmax(0)  # (N,) the factor that a unit knows best
        self.groups = {f: sorted({u, *np.flatnonzero(self.active & (favourite == f)).tolist()})
                       for f, u in self.best.items()}
        self.group_labels = [f"{self.names[f]}: {' '.join(map(str, units))}" for f, units in self.groups.items()]


def aligned(model, ds, idx):
    """Aligned units c~ (B, N, D) of the images idx (B,), on the CPU."""
    return model.dyga.align(model.units(ds.images(idx))).cpu()


def generate(model, c, noise, steps, desc):
    """DDIM images uint8 (..., 3, H, W) under aligned units c (..., N, D), all from one starting noise (1, z, h, w)."""
    parts = tqdm(c.flatten(0, -3).split(64), desc, leave=False, disable=None)
    made = [model.sample(part.to(noise.device), noise=noise.expand(len(part), -1, -1, -1), steps=steps).cpu()
            for part in parts]
    return torch.cat(made).unflatten(0, c.shape[:-2])  # (..., 3, H, W)


def figure_interchange(model, ds, probe, source, target, noise, steps):
    """Figures 3 and 8: give the source the target's units of one factor and see what changes. source, target: (C,).

    Paper: exchanges one unit. Several units may stand for one factor, as they do for hues here; one of them alone then
    changes the factor by half, and the question is whether all of them change it alone.
    """
    c, c_target = aligned(model, ds, source), aligned(model, ds, target)  # (C, N, D)
    swapped = c.repeat(1 + len(probe.best), 1, 1, 1)  # (R, C, N, D), the first row as it is
    for row, units in enumerate(probe.groups.values()):
        swapped[1 + row][:, units] = c_target[:, units]  # only these are the target's
    inputs = torch.stack([ds.images(idx).cpu() for idx in (source, target)])  # (2, C, 3, H, W)
    made = generate(model, swapped, noise, steps, "interchange")  # (R, C, 3, H, W)
    labels = ["source", "target", "source, generated", *(f"target's {label}" for label in probe.group_labels)]
    title = "Latent interchange: one factor's units from the target"
    return data.image_grid(torch.cat([inputs, made]), labels, None, title, 2)


def figure_interpolation(model, ds, probe, pair, noise, steps, columns):
    """Figure 6: from image A to image B, all units at once, then one factor's at a time. pair: (2,)."""
    # Aligned units are what the denoiser knows. What lies between is not aligned once more: that would make steps.
    a, b = aligned(model, ds, pair)  # (N, D) each
    t = torch.linspace(0, 1, columns)  # (T,)
    path = a + t[:, None, None] * (b - a)  # (T, N, D)
    paths = a.repeat(1 + len(probe.best), columns, 1, 1)  # (R, T, N, D)
    paths[0] = path  # all units move
    for row, units in enumerate(probe.groups.values()):
        paths[1 + row][:, units] = path[:, units]  # one factor's units move
    made = generate(model, paths, noise, steps, "interpolation")  # (R, T, 3, H, W)
    A, B = ds.images(pair).cpu().expand(len(made), -1, -1, -1, -1).split(1, 1)  # (R, 1, 3, H, W)
    return data.image_grid(torch.cat([A, made, B], 1), ["all units", *probe.group_labels], [
        "A", *(f"t={x:.2f}" for x in t.tolist()), "B"], "Interpolation from A to B: all units, then one factor's", 2)


def heat(x):
    """Numbers in [0, 1] of any shape (...) to colours uint8 (..., 3): dark blue is 0, yellow is 1."""
    stops = np.array([[26, 20, 70], [40, 90, 140], [35, 145, 140], [100, 200, 90], [250, 230, 40]], float)
    return np.stack([np.interp(x, np.linspace(0, 1, 5), channel) for channel in stops.T], -1).astype(np.uint8)


def figure_attention(model, ds, probe, idx, noise, steps):
    """Figures 4, 9 and 10: where in the image each factor's unit is looked up, averaged in DAAM's way. idx: (B,)."""
    c = aligned(model, ds, idx).to(noise.device)  # (B, N, D)
    z, maps = ddim(model.unet, noise.expand(len(c), -1, -1, -1), c, model.alpha_bar, steps, attention=True)
    made = model.vqgan.decode(z).cpu()  # (B, 3, H, W)
    maps = F.interpolate(maps[:, list(probe.best.values())], size=made.shape[2:], mode="bilinear").cpu()
    # Maps of one image sum to 1 over units, so most are pale. Each gets the whole range of colours.
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)  # (B, shown, 1, 1)
    colours = torch.from_numpy(heat((maps - low) / (high - low).clamp(min=1e-12))).movedim(-1, 2)
    grey = made.float().mean(1)[:, None, None]  # (B, 1, 1, H, W)
    overlaid = (0.35 * grey + 0.65 * colours).to(torch.uint8)  # (B, shown, 3, H, W)
    tiles = torch.cat([ds.images(idx).cpu()[:, None], made[:, None], overlaid], 1)
    return data.image_grid(tiles, [f"image {i}" for i in idx.tolist()], ["input", "sample", *probe.labels],
                           "Cross-attention per unit (yellow: most), averaged over heads, layers and steps", 2)


def text(draw, x, y, words, size=13, anchor="la", fill="black"):
    """Pillow's text and anchors: l, m, r across; a (top), m, s (baseline) down."""
    draw.text((x, y), str(words), fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def figure_matrix(probe):
    """Normalised mutual information of every factor (rows) and unit (columns); inactive units have grey numbers."""
    rows, columns = probe.nmi.shape  # F, N
    left, top, w, h = 24 + 8 * max(map(len, probe.names)), 64, 44, 30  # w, h: of one cell
    sheet = Image.new("RGB", (max(left + columns * w + 12, 560), top + rows * h + 12), "white")
    draw = ImageDraw.Draw(sheet)
    text(draw, 8, 6, "Normalised mutual information: how much of a factor a unit tells (0 to 1)", 15)
    text(draw, left - 8, 54, "unit", anchor="rs")
    for u in range(columns):
        text(draw, left + u * w + w / 2, 54, u, anchor="ms", fill="black" if probe.active[u] else "#999999")
    for f, u in np.ndindex(rows, columns):  # cell by cell
        x, y, value = left + u * w, top + f * h, probe.nmi[f, u].clip(0, 1)
        draw.rectangle([x, y, x + w - 2, y + h - 2], fill=tuple(heat(value).tolist()))
        text(draw, x + w / 2, y + h / 2, f"{value:.2f}", 12, "mm", "black" if value > 0.55 else "white")
    for f, name in enumerate(probe.names):
        text(draw, left - 8, top + f * h + h / 2, name, anchor="rm")
    return sheet


def draw_points(xy, colours, anchors, share, side):
    """One panel: points (n, 2) in [0, 1], their colours (n, 3), anchors (K, 2) as crosses; share: variance per axis."""
    S = 2 * side  # drawn at twice the size, then halved: smooth dots
    panel = Image.new("RGB", (S, S), "#fbfbfb")  # a panel stands out from the white sheet
    draw = ImageDraw.Draw(panel)
    for (x, y), colour in zip(xy * [S, -S] + [0, S], colours.tolist()):  # a picture's y grows downwards
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=tuple(colour))
    for x, y in anchors * [S, -S] + [0, S]:
        draw.line([x - 8, y - 8, x + 8, y + 8], fill="black", width=3)
        draw.line([x - 8, y + 8, x + 8, y - 8], fill="black", width=3)
    draw.rectangle([0, 0, S - 1, S - 1], outline="#999999", width=2)
    text(draw, 12, 12, f"PC 2 ({share[1]:.0%})", 24)
    text(draw, S - 12, S - 12, f"PC 1 ({share[0]:.0%})", 24, "rs")
    return panel.resize((side, side), Image.LANCZOS)


def figure_units(model, probe, sizes, n=1500):
    """Figures 1 and 11: each factor's best unit in 2-D, coloured by the factor's value, before and after
    alignment."""
    dyga, side, left, top, pitch = model.dyga, 230, 66, 56, 244  # pitch: from one panel to the next
    rows = [probe.c[:n].numpy(), dyga.align(probe.c[:n].to(dyga.anchors.device)).cpu().numpy()]  # (n, N, D) each
    sheet = Image.new("RGB", (left + max(3, len(probe.best)) * pitch, top + 2 * pitch + 46), "white")
    draw = ImageDraw.Draw(sheet)
    text(draw, 8, 6, "Units in 2-D: first two principal components before alignment; crosses are anchors", 15)
    for y, name in ((side / 2, "before"), (pitch + side / 2, "after"), (2 * pitch + 7, "value")):
        text(draw, 8, top + y, name, 14, "lm")
    for column, (f, u) in enumerate(probe.best.items()):
        x0, y0, mean = left + column * pitch, top + 2 * pitch, rows[0][:, u].mean(0)
        text(draw, x0, top - 8, f"{probe.labels[column]}, NMI {probe.nmi[f, u]:.2f}", anchor="ls")
        _, s, axes = np.linalg.svd(rows[0][:, u] - mean, full_matrices=False)  # (D, D), the first axis first
        share = s ** 2 / max((s ** 2).sum(), 1e-30)  # (D,)
        # Both rows have the axes and limits of the first. Its middle 99% sets them: outliers would squeeze the rest.
        low, high = np.percentile((rows[0][:, u] - mean) @ axes[:2].T, [0.5, 99.5], axis=0)
        points = [((c - mean) @ axes[:2].T - low) / np.maximum(1.3 * (high - low), 1e-9) + 0.115  # (.., 2) in [0, 1]
                  for c in (*(row[:, u] for row in rows), dyga.anchors[u][dyga.mask[u]].cpu().numpy())]
        # One colour per value: hues around the wheel, every second one darker.
        hsv = [(k * 235 // sizes[f], 220, 160 if k % 2 else 235) for k in range(sizes[f])]
        colours = np.asarray(Image.fromarray(np.array([hsv], np.uint8), "HSV").convert("RGB"))[0]  # (values, 3)
        for row in range(2):
            panel = draw_points(points[row], colours[probe.factors[:n, f]], points[2], share, side)
            sheet.paste(panel, (x0, top + row * pitch))
        w = min(side / sizes[f], 20)  # the legend: a square per value, with its number where there is room
        for k, colour in enumerate(colours.tolist()):
            draw.rectangle([x0 + k * w, y0, x0 + (k + 1) * w - 1, y0 + 14], fill=tuple(colour))
            if w > 14 or k in (0, sizes[f] - 1):
                text(draw, x0 + k * w + w / 2, y0 + 18, k, 11, "ma")
    return sheet


def traversal(model, ds, probe, idx, noise, steps, units, stops):
    """Pictures for the page's interactive part: images x units x positions, uint8 (I, U, S, 3, H, W).

    A position is a quantile of the unit's PCA coordinate, 0.02 to 0.98, and takes the WHOLE unit, all its numbers, from
    a real image that lies there: a straight line along the PCA's axis would leave the curve on which the units lie.
    """
    order = probe.codes[:, units].argsort(0)  # (n, U)
    ranks = (np.linspace(0.02, 0.98, stops) * (len(order) - 1)).round().astype(int)  # (S,)
    donors = model.dyga.align(probe.c[order[ranks].T.reshape(-1)].to(noise.device)).cpu()  # (U*S, N, D)
    c = aligned(model, ds, idx)[:, None, None].repeat(1, len(units), stops, 1, 1)  # (I, U, S, N, D)
    for j, u in enumerate(units):  # only unit u comes from the donors
        c[:, j, :, u] = donors[j * stops:(j + 1) * stops, u]
    return generate(model, c, noise, steps, "traversal")

# ---- Report ---------------------------------------------------------------------------------------------------------

# Name on the command line -> function, and the counts of --quick; the functions' defaults are the paper's. The
# efficiency of trees has fixed training sets, the first of 10,000 labels: it cannot be quick.
METRICS = {
    "factorvae": (factor_vae, dict(n_variance=2_000, n_train=500, n_test=250)),
    "dci": (dci, dict(n_train=1_000, n_test=1_000)),
    "mig": (mig, dict(n_train=2_000)),
    "modularity": (modularity, dict(n_train=2_000)),
    "sap": (sap, dict(n_train=2_000, n_test=1_000)),
    "infomec": (infomec, dict(n_train=2_000)),
    "gbt": (gbt_efficiency, {}),
}
# Score -> its name in print, then the paper's own rows (Tables 1 and 10, 5, 2), one per dataset.
DATASETS = ["shapes3d", "cars3d", "mpi3d_toy", "celeba"]
SCORES = {
    "factorvae": ("FactorVAE score", "1.000 +- 0.000", "0.941 +- 0.002", "0.930 +- 0.004", ""),
    "dci_disentanglement": ("DCI disentanglement", "0.938 +- 0.001", "0.414 +- 0.013", "0.627 +- 0.002", ""),
    "mig": ("MIG", "0.507 +- 0.002", "0.109 +- 0.002", "0.364 +- 0.001", ""),
    "modularity": ("Modularity", "0.930 +- 0.001", "0.934 +- 0.001", "0.882 +- 0.002", ""),
    "sap": ("SAP", "0.183 +- 0.006", "0.009 +- 0.002", "0.174 +- 0.002", ""),
    "infomec_infom": ("InfoM", "0.569 +- 0.002", "0.417 +- 0.004", "0.495 +- 0.003", ""),
    "gbt_acc_1000_ratio": ("GBT Acc1000 / Acc", "0.990 +- 0.000", "", "0.888 +- 0.002", ""),
    "gbt_acc_100_ratio": ("GBT Acc100 / Acc", "0.863 +- 0.001", "", "0.757 +- 0.001", ""),
    "tad_tad": ("TAD", "", "", "", "0.954 +- 0.024"),
    "fid": ("FID (lower is better)", "", "", "", "12.0 +- 1.2"),
} | {name: (label, "", "", "", "") for name, label in (  # and those of which the paper says nothing
    ("dci_completeness", "DCI completeness"), ("dci_informativeness", "DCI informativeness"),
    ("infomec_infoc", "InfoC"), ("infomec_infoe", "InfoE"), ("gbt_acc", "GBT accuracy, 10,000 labels"),
    ("tad_captured", "captured"), ("tad_tad_exact", "TAD, exact AUROC"), ("tad_captured_exact", "captured, exact"))}
# Figure -> title, and what to look for.
FIGURES = {
    "samples": ("Samples of the dataset (Figure 5)", "What the model was shown: every factor varies freely."),
    "matrix": ("Which unit knows which factor", "One bright cell per row, each in a column of its own, is perfect. Two "
               "in a column: a unit that mixes factors. Two in a row: units that share a factor."),
    "interchange": ("Latent interchange (Figures 3 and 8)", "Each row should change the one thing that it is named "
                    "after to the target's value, and nothing else of the source."),
    "interpolation": ("Interpolation (Figure 6)", "The first row should turn A into B, every other row change one."),
    "attention": ("Attention maps (Figures 4, 9 and 10)", "A unit should be looked up where its factor is seen: a "
                  "floor hue on the floor. Each map has its own range of colours."),
    "units": ("Units by factor value, before and after alignment (Figures 1 and 11)", "Equal colours should lie "
              "together; alignment should pull them towards the anchors and clear the space between."),
    "loss": ("Training loss (Figure 7)", "It should fall and level off; a jump or a rise means instability."),
}


def score_rows(name, function, seeds, counts):
    """function(seed) for each seed -> score name -> dict: value (mean), std, values, counts, seeds, seconds, notes."""
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        runs = [function(seed) for seed in seeds]  # numbers, or dicts of numbers
    runs = [{f"{name}_{part}": x for part, x in run.items()} if isinstance(run, dict) else {name: run} for run in runs]
    shared = {"counts": counts, "seeds": list(seeds), "seconds": round(time.perf_counter() - started, 1),
              "notes": sorted({str(w.message) for w in caught if w.category is UserWarning})}
    rows = {}
    for part in runs[0]:
        # JSON knows no nan: an undefined score is null, and a note says why.
        values = [None if math.isnan(run[part]) else run[part] for run in runs]
        mean = None if None in values else float(np.mean(values))
        std = None if len(values) < 2 or mean is None else float(np.std(values, ddof=1))
        rows[part] = {"value": mean, "std": std, "values": values, **shared}
    return rows


def table(report):
    """The scores as rows of texts, the first of them the head."""
    rows = [("metric", f"ours ({report['images']})", "paper", "samples", "seed")]
    for name, row in report["scores"].items():
        label, *paper = SCORES[name]
        ours = "undefined" if row["value"] is None else f"{row['value']:.3f}"
        ours += "" if row["std"] is None else f" +- {row['std']:.3f}"
        counts = ", ".join(f"{key.removeprefix('n_')} {value:,}" for key, value in row["counts"].items())
        rows.append((label, ours, paper[DATASETS.index(report["dataset"])], counts, ", ".join(map(str, row["seeds"]))))
    return rows


def remarks(report):
    """What a reader must know before quoting a number: a list of sentences."""
    said, s, d = [], report["separation"], report["delta"]
    if report["images_seen"] is None:
        said.append("Released weights of the paper's repository or EncDiff's: the file does not say how long they were "
                    "trained, and there are no anchors in it. The paper's numbers are of its own method.")
    if report["source"] == "rendered":
        said.append("The images are the rendered twin of Shapes3D, not Shapes3D itself: no score here is a Shapes3D "
                    "score, and the paper's numbers stand beside ours for orientation only.")
    if report["quick"]:
        said.append("Quick run: most counts are smaller than the paper's; scores at other counts cannot be compared.")
    said += [note for row in report["scores"].values() for note in row["notes"]]
    if s:
        said.append("Separation before and after alignment, means over active units: purity of anchors by labels "
                    "{:.3f}, {:.3f} (one single anchor: {:.3f}); share of pure anchors {:.3f}, {:.3f}; margin "
                    "{:.3f}, {:.3f}."
                    .format(*(s[key] for key in ("purity_before", "purity_after", "chance", "pure_before",
                                                 "pure_after", "margin_before", "margin_after"))))
    said.append("Mean delta of equation 6: {mean_delta:.1e}, lambda {lambda:g}; the released code's formula gives "
                "{released_delta:.1e} on the same units.".format(**d) if d else "No anchors: nothing is aligned.")
    return list(dict.fromkeys(said))  # each sentence once

# Everything is inside the page, so that it opens from disk, offline; $name is filled in.
PAGE = string.Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 0 auto; padding: 12px; color: #222 }
p, figcaption { max-width: 80ch }
table { border-collapse: collapse } td, th { padding: 4px 10px; border-bottom: 1px solid #ddd; text-align: left }
.wide { overflow-x: auto; white-space: nowrap } figure { margin: 0 } h2 { margin-top: 36px } figcaption { color: #555 }
.note { background: #fff6df; padding: 8px 12px; border-left: 4px solid #d9a400 } label { display: block; margin: 8px 0 }
.player { display: flex; flex-wrap: wrap; gap: 16px } input, select { width: 240px; font-size: 16px }
#view { width: 256px; height: 256px; image-rendering: pixelated; border: 1px solid #999 }
</style></head><body><h1>$title</h1>$notes<h2>Scores</h2><div class="wide" tabindex="0">$scores</div>$player$figures
<h2>Configuration</h2><details><summary>All settings</summary><div class="wide">$config</div></details></body>""")

PLAYER = string.Template("""<h2>Turn one unit</h2><p>Pick an image and a unit, then move the slider (by keyboard: Tab,
then the arrow keys). One thing should change.</p><div class="player"><div id="view" role="img" aria-label="generated">
</div><div><label>Image<br><select id="image">$images</select></label><label>Unit<br><select id="unit">$units</select>
</label><label>The unit's value, low to high<br><input id="slider" type="range" min="0" max="$last" value="0"></label>
<output id="said" aria-live="polite"></output></div></div><script>
const strips = $strips, stops = $last + 1, byId = id => document.getElementById(id);
function show() {
  const place = +byId("slider").value, strip = strips[byId("image").selectedIndex][byId("unit").selectedIndex];
  byId("view").style.background = "url(" + strip + ") " + -256 * place + "px 0 / " + 256 * stops + "px 256px";
  byId("said").textContent = "position " + (place + 1) + " of " + stops;
}
for (const id of ["image", "unit", "slider"]) byId(id).addEventListener("input", show);
show();</script>""")


def html_table(rows):
    """Rows of texts as an HTML table; the first row is the head."""
    cells = ["".join(f"<td>{html.escape(str(x))}</td>" for x in row) for row in rows]
    return "<table><tr>" + "</tr><tr>".join([cells[0].replace("td>", "th>"), *cells[1:]]) + "</tr></table>"


def inline(picture):
    """A PIL.Image or a PNG's path as an address that holds the picture itself."""
    buffer = io.BytesIO()  # a file in memory
    (picture if isinstance(picture, Image.Image) else Image.open(picture)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def player(moved, idx, units):
    """The interactive part of the page. moved: see traversal(); idx: its images; units: a text for each unit."""
    # One strip per image and unit, the positions side by side: the page shows one window of it.
    strips = [[inline(Image.fromarray(torch.cat([*strip], 2).movedim(0, 2).contiguous().numpy())) for strip in row]
              for row in moved]
    options = [f"<option>{html.escape(word)}</option>" for word in [f"image {i}" for i in idx] + units]
    return PLAYER.substitute(images="".join(options[:len(idx)]), units="".join(options[len(idx):]),
                             last=moved.shape[2] - 1, strips=json.dumps(strips))


def page(report, config, out, interactive):
    """index.html as text. The figures are read from out."""
    figures = "".join(f'<h2>{title}</h2><figure><figcaption>{sentence}</figcaption><div class="wide" tabindex="0">'
                      f'<img alt="{title}" src="{inline(out / f"{name}.png")}"></div></figure>'
                      for name, (title, sentence) in FIGURES.items() if name in report["figures"])
    about = [(key, report[key]) for key in ("checkpoint", "images", "images_seen", "minutes", "pca_images")
             if report[key] is not None]
    return PAGE.substitute(
        title=f"Disentangled units: {report['images']}", scores=html_table(table(report)), player=interactive,
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in remarks(report)), figures=figures,
        config=html_table([("setting", "value"), *about, *sorted(config.items())]))

# ---- Released weights -----------------------------------------------------------------------------------------------
# The paper's own models (GitHub youngjun-jun/dis-dis) are Lightning files of latent diffusion's networks: the same as
# ours, under other names. These tables translate our names, so that their weights can be scored with our code. EncDiff,
# the paper's baseline (reference 67), differs in the extractor only.

UNITS, STAGE1, UNET = "cond_stage_model.", "first_stage_model.", "model.diffusion_model."
# Layers within a block: ours -> theirs.
LAYERS = {
    "vqgan": {"branch.0.0": "norm1", "branch.1": "conv1", "branch.2.0": "norm2", "branch.3": "conv2",
              "shortcut": "nin_shortcut", "to_out": "proj_out", "upsample.1": "upsample.conv",
              "norm_out.0": "norm_out"},
    "unet": {"norm_in": "in_layers.0", "conv_in": "in_layers.2", "time": "emb_layers.1", "norm_out": "out_layers.0",
             "conv_out": "out_layers.3", "shortcut": "skip_connection", "to_out": "to_out.0"}
    | {ours: f"transformer_blocks.0.{theirs}" for ours, theirs in (
        ("norm_self", "norm1"), ("norm_cross", "norm2"), ("norm_ff", "norm3"), ("self_attention", "attn1"),
        ("cross_attention", "attn2"), ("ff_in", "ff.net.0.proj"), ("ff_out", "ff.net.2"))},
}
FUSED = {"to_kv": ("to_k", "to_v"), "to_qkv": ("q", "k", "v")}  # one layer here, several there
# What a file may hold beyond weights: the noise schedule, counters, stage 1's losses.
UNUSED = re.compile(r"betas|(alphas|sqrt|log_one|posterior)_\w+|(shift|ddim)_coef|logvar|lvlb_weights"
                    r"|model_ema\.(decay|num_updates)|first_stage_model\.(loss|model_ema)\..+")


class EncDiffBlock(torch.nn.Module):
    """A residual block of EncDiff's extractor: x + convs(x)."""

    def __init__(self, width):
        super().__init__()
        self.convs = torch.nn.Sequential(
            torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(), torch.nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + self.convs(x)


class EncDiffExtractor(torch.nn.Module):
    """EncDiff's extractor, layers named as in its files: images (B, 3, 64, 64) in [-1, 1] -> units c (B, N, D).

    width: of every convolution (theirs: 128); unit_widths: of a unit's private MLP, such as (1, 64, 128, 16).
    Source: class Encoder4 of its code, of which GitHub's SelenaGeRuiqi/EncDiff holds a copy.
    """

    def __init__(self, width, n_units, unit_widths):
        super().__init__()

        def halve(c_in):
            return torch.nn.Conv2d(c_in, width, 4, stride=2, padding=1), torch.nn.BatchNorm2d(width)
        relu = torch.nn.ReLU()
        self.encoder = torch.nn.Sequential(
            *halve(3), relu, *halve(width), relu, *halve(width), *halve(width), relu, EncDiffBlock(width),
            torch.nn.BatchNorm2d(width), relu, EncDiffBlock(width), torch.nn.Flatten(),
            torch.nn.Linear(16 * width, n_units))  # 64 pixels, halved four times: 4 x 4
        a, b, c, d = unit_widths
        self.net = torch.nn.ModuleList(torch.nn.Sequential(
            torch.nn.Linear(a, b), torch.nn.ELU(), torch.nn.Linear(b, c), torch.nn.ELU(), torch.nn.Linear(c, d))
            for _ in range(n_units))

    def forward(self, x):
        s = self.encoder(x)  # (B, N)
        return torch.stack([net(s[:, u:u + 1]) for u, net in enumerate(self.net)], dim=1)  # (B, N, D)


class Foreign:
    """Takes the place of every class and function that a file names: nothing of the file's can run."""

    def __init__(self, *args):
        pass


def read_released(path):
    """Lightning file, or a plain state_dict, of the released code -> dict of tensors. UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model file of the paper's released code")
    try:
        train.check_archive(path)
        # Old Lightning wrote classes of its own beside the weights, such as a callback's. Nobody needs them here.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Foreign, name) for name in names]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can fail in any way
        raise UserError(f"{path}: cannot be loaded safely ({type(error).__name__}); if you trust the file, re-save its "
                        "weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)") from error
    weights = found.get("state_dict", found) if isinstance(found, dict) else {}
    weights = weights if isinstance(weights, dict) else {}
    return {name: x for name, x in weights.items() if isinstance(name, str) and torch.is_tensor(x)}


def released_places(cfg, stages):
    """Where our blocks are in their file: the first part of a name, ours -> theirs. stages: len(unet.down).

    Their stage 1 counts the decoder's levels from the finest, but runs through them from the coarsest.
    """
    levels, n, mid = len(cfg["vqgan.multipliers"]), cfg["vqgan.res_blocks"], ("block_1", "attn_1", "block_2")
    encoder = ["", "encoder.conv_in"]
    decoder = ["post_quant_conv", "decoder.conv_in", *(f"decoder.mid.{x}" for x in mid)]
    for k in range(levels):
        down, up = f"encoder.down.{k}", f"decoder.up.{levels - 1 - k}"
        encoder += [f"{down}.block.{b}" for b in range(n)] + [f"{down}.downsample"] * (k < levels - 1)
        decoder += [f"{up}.block.{b}" for b in range(n + 1)] + [f"{up}.upsample"] * (k < levels - 1)
    encoder += [*(f"encoder.mid.{x}" for x in mid), "encoder.norm_out", "encoder.conv_out", "quant_conv"]
    decoder += ["decoder.norm_out", "decoder.conv_out"]
    unet = {"time_mlp": "time_embed", "conv_in": "input_blocks.0.0", "middle": "middle_block", "up": "output_blocks",
            "norm_out": "out.0", "conv_out": "out.2"} | {f"down.{i}": f"input_blocks.{i + 1}" for i in range(stages)}
    return {"extractor": UNITS[:-1],  # EncDiff's; the paper's is in two parts, and private MLPs (see released_names)
            "extractor.cnn": f"{UNITS}image_encoder.encoder", "extractor.to_scalars": f"{UNITS}image_encoder.fc",
            "vqgan.codebook.codes": f"{STAGE1}quantize.embedding.weight", "vqgan.latent_std": "scale_factor",
            "alpha_bar": "alphas_cumprod", **{f"unet.{ours}": UNET + theirs for ours, theirs in unet.items()},
            **{f"vqgan.encoder.{i}": STAGE1 + theirs for i, theirs in enumerate(encoder)},
            **{f"vqgan.decoder.{i}": STAGE1 + theirs for i, theirs in enumerate(decoder)}}


def released_names(name, places, n_units):
    """The name of a tensor of ours -> those of the tensors in their file that it is made of, a list."""
    network, *parts = name.split(".")
    if parts[:1] == ["unit_mlp"]:  # a small network per unit, whose layers 1, 3 and 5 are ReLUs
        return [f"{UNITS}mlps.{u}.layers.{2 * int(parts[1])}.{parts[2]}" for u in range(n_units)]
    place = max((ours for ours in places if f"{name}.".startswith(f"{ours}.")), key=len)
    name = places[place] + name.removeprefix(place)
    for ours, theirs in LAYERS.get(network, {}).items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return next(([name.replace(f".{ours}.", f".{one}.") for one in theirs] for ours, theirs in FUSED.items()
                 if f".{ours}." in name), [name])


def load_released(path, dataset, device="cpu"):
    """A file of the released code, or of EncDiff's -> (model in eval mode, what main needs of a checkpoint), without
    anchors.

    Sizes come from the tensors' shapes; what no shape tells is Table 8's, such as 8 heads. UserError names the first
    tensor that is missing, left over, or of another shape.
    """
    weights, used = read_released(path), set()

    def take(name):
        if name not in weights:
            raise UserError(f"{path}: has no {name}; expected a model file of youngjun-jun/dis-dis or EncDiff, as "
                            "their code writes it")
        used.add(name)
        return weights[name]

    def sizes(*names):
        return [len(take(name)) for name in names]
    cfg = {name: default for name, (default, _) in train.all_settings().items()} | {"anchors": "none"}
    try:
        encdiff = f"{UNITS}net.0.0.bias" in weights
        mlp = f"{UNITS}net.0" if encdiff else f"{UNITS}mlps.0.layers"
        *cfg["extractor.unit_hidden"], cfg["extractor.unit_dim"] = sizes(*(f"{mlp}.{i}.bias" for i in (0, 2, 4)))
        if encdiff:
            width, cfg["extractor.n_units"] = sizes(f"{UNITS}encoder.0.bias", f"{UNITS}encoder.16.bias")
        else:
            encoder = f"{UNITS}image_encoder"
            cfg["extractor.channels"] = sizes(*(f"{encoder}.encoder.{i}.bias" for i in (0, 3, 6, 9, 12)))
            *cfg["extractor.hidden"], cfg["extractor.n_units"] = sizes(*(f"{encoder}.fc.{i}.bias" for i in (0, 2, 4)))
        cfg["vqgan.channels"], cfg["vqgan.z_channels"], cfg["vqgan.codebook_size"], cfg["unet.base"] = sizes(
            f"{STAGE1}encoder.conv_in.bias", f"{STAGE1}quant_conv.bias", f"{STAGE1}quantize.embedding.weight",
            f"{UNET}input_blocks.0.0.bias")
        model = train.Model(cfg)
        if encdiff:
            widths = 1, *cfg["extractor.unit_hidden"], cfg["extractor.unit_dim"]
            model.extractor = EncDiffExtractor(width, cfg["extractor.n_units"], widths)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: the sizes of its tensors make no network of the paper's ({error})") from error
    places = released_places(cfg, len(model.unet.down))
    for name, ours in (model.state_dict() | {"alpha_bar": model.alpha_bar}).items():
        if name.startswith("dyga.") or name == "vqgan.codebook.uses":
            continue
        names = released_names(name, places, cfg["extractor.n_units"])
        theirs = [take(one) for one in names]
        if name.startswith("unet.") and "model_ema.decay" in weights:
            # Samples are drawn with averaged weights. Only the U-Net has any; their names have lost all dots.
            theirs = [take("model_ema." + one.removeprefix("model.").replace(".", "")) for one in names]
        if "unit_mlp" in name:  # N of (out, in) -> (N, in, out); N of (out,) -> (N, 1, out)
            theirs = [x.T[None] if x.ndim == 2 else x[None, None] for x in theirs]
        if name.startswith("unet.") and ".proj_" in name:  # 1x1 convolutions there
            theirs = [x.flatten(1) if x.ndim == 4 else x for x in theirs]
        shapes = {x.shape for x in theirs}  # those that make one tensor are alike
        theirs = torch.cat(theirs) if len(theirs) > 1 and len(shapes) == 1 else theirs[0]
        if len(shapes) > 1 or theirs.shape != ours.shape:
            raise UserError(f"{path}: {names[0]} makes shape {tuple(theirs.shape)}; expected {tuple(ours.shape)}")
        # They multiply latents by this number, we divide.
        ours.copy_(1 / theirs if name == "vqgan.latent_std" else theirs)
    left = [name for name in weights if name not in used and not UNUSED.fullmatch(name)]
    if left:
        raise UserError(f"{path}: {left[0]} has no place in these networks; expected the released code's layout")
    for module in model.vqgan.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 32  # theirs at every width; ours has fewer, wider groups
    # The page shows the networks' settings only: how they were trained, the file does not say.
    known = ["vqgan.", "unet.", "extractor.n_units", "extractor.unit_dim", "extractor.unit_hidden"]
    if not encdiff:
        known += ["extractor.channels", "extractor.hidden", "extractor.unit_relu"]
    config = {name: value for name, value in cfg.items() if name.startswith(tuple(known)) and "dropout" not in name}
    config["ddim_steps"] = cfg["ddim_steps"]
    ckpt = {"config": config, "dataset": {"name": dataset, "source": "auto"}, "images_seen": None, "minutes": None}
    return model.to(device).eval(), ckpt

# ---- Main -----------------------------------------------------------------------------------------------------------


def indices(words):
    """A flag's comma-separated whole numbers as a list."""
    return list(map(int, words.split(",")))


def build_parser():
    """Every flag with its help."""
    p = data.Parser(description="Score a checkpoint of train.py, draw its figures, and write one page with all of it.")
    p.add_argument("checkpoint", help="ckpt.pt of train.py; nothing else is needed")
    p.add_argument("--released", choices=DATASETS, metavar="DATASET",
                   help="the checkpoint is a file of the paper's released code, or EncDiff's, trained on this dataset: "
                   + ", ".join(DATASETS))
    p.add_argument("--out", help="folder for everything written (default: eval, beside the checkpoint)")
    p.add_argument("--quick", action="store_true",
                   help="smaller sample counts (scores at other counts cannot be compared), fewer pictures, no gbt")
    p.add_argument("--only", type=lambda words: words.split(","), metavar="A,B",
                   help=f"some of {', '.join(METRICS)}, figures (celeba: tad); the report then holds nothing else")
    p.add_argument("--fid", type=int, default=0, metavar="N", help="FID of N generated images as well; needs a file")
    p.add_argument("--seed", type=int, default=0, help="seed of all samples and of the figures' noise")
    p.add_argument("--seeds", type=int, default=1, metavar="K", help="repeat all but tad with K seeds: mean, deviation")
    p.add_argument("--images", type=indices, default=[], metavar="I,J", help="images of the figures (default: random)")
    p.add_argument("--data_dir", default="data", help="folder of the datasets' files")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return p


def chosen_parts(args, ds, n_units):
    """Metrics to run, and "figures". UserError for what is unknown or does not apply to the dataset or the model."""
    apply = ["tad"] if ds.name == "celeba" else list(METRICS)
    wrong = set(args.only or []) - {*apply, "figures"}
    if wrong:
        why = " (it is no grid of factors, which other metrics need)" if ds.name == "celeba" else ""
        raise UserError(f"--only {','.join(sorted(wrong))}: for {ds.name} choose from {', '.join(apply)}, figures{why}")
    if args.seeds < 1 or args.seed < 0 or args.seed + args.seeds > 2**32:  # numpy takes no larger one
        raise UserError(f"--seed {args.seed}, --seeds {args.seeds}: expected at least 0 and 1, together at most 2^32")
    if args.fid and not 2 <= args.fid <= len(ds):
        raise UserError(f"--fid {args.fid}: expected 2 to {len(ds):,}, the images of {ds.name}; best 2,048 and more")
    if any(not 0 <= i < len(ds) for i in args.images):
        raise UserError(f"--images {args.images}: {ds.name} has images 0 to {len(ds) - 1}")
    parts = args.only or [name for name in apply if not (args.quick and name == "gbt")] + ["figures"]
    compare = [name for name in parts if name in ("dci", "mig", "sap", "tad")]
    if n_units == 1 and compare:
        raise UserError(f"the model has 1 unit, and {', '.join(compare)} compare units; name others with --only")
    return parts


def draw_figures(model, ds, probe, args, steps, log, out):
    """Write all figures to out. Returns their names, and the HTML of the interactive part."""
    # One starting noise for everything: what differs between two pictures comes from the units.
    noise, quick = model.noise(1, torch.Generator().manual_seed(args.seed)), args.quick
    # Images that the user names come first, random ones follow.
    idx, named = torch.cat([torch.tensor(args.images, dtype=torch.int64), probe.idx]), len(args.images)
    width = max(6 if quick else 8, named)  # of the interchange, in images
    made = {
        "samples": data.image_grid(ds.images(probe.idx[:48]).unflatten(0, (4, 12)),
                                   title=f"{ds.name}, {ds.source} images: a random sample"),
        "matrix": figure_matrix(probe),
        # Each source has the next image as its target.
        "interchange": figure_interchange(model, ds, probe, idx[:width], idx[1:width + 1], noise, steps),
        "interpolation": figure_interpolation(model, ds, probe, idx[:2], noise, steps, columns=5 if quick else 9),
        "attention": figure_attention(model, ds, probe, idx[:max(4, named)], noise, steps),
        "units": figure_units(model, probe, ds.factor_sizes),
    }
    for name, picture in made.items():
        with data.replacing(out / f"{name}.png") as temporary:
            picture.save(temporary)
    shown, units = idx[:max(2 if quick else 4, named)], np.argsort(-probe.nmi.max(0))[:4 if quick else 12].tolist()
    labels = [f"unit {u} ({probe.names[probe.nmi[:, u].argmax()]}, NMI {probe.nmi[:, u].max():.2f})" for u in units]
    moved = traversal(model, ds, probe, shown, noise, steps, units, stops=5 if quick else 9)
    has_log = log.is_file() and not args.released  # beside a released file it would be another model's
    if has_log:
        train.loss_picture(log, out / "loss.png")
    return [*made] + ["loss"] * has_log, player(moved, shown.tolist(), labels)


def main():
    """Check everything, score, draw, and write the report."""
    args = build_parser().parse_args()
    checkpoint = Path(args.checkpoint)
    out = Path(args.out or checkpoint.parent / "eval")
    # All that can be wrong with the command is found before anything is written.
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is there; expected a folder, or nothing yet")
    device = train.pick_device(args.device)  # "auto" prefers a GPU
    if args.released:
        model, ckpt = load_released(checkpoint, args.released, device)
        trained = "released weights"
    else:
        model, ckpt = train.load_checkpoint(checkpoint, device)
        trained = f"{ckpt['images_seen']:,} images in {ckpt['minutes']:.1f} minutes"
    ds = data.load(ckpt["dataset"]["name"], args.data_dir, ckpt["dataset"]["source"], device)
    parts = chosen_parts(args, ds, ckpt["config"]["extractor.n_units"])  # metrics and "figures"
    inception = load_inception(args.data_dir, device) if args.fid else None

    images = f"{ds.name}, rendered twin" if ds.source == "rendered" else f"{ds.name}, {ds.source}"
    print(f"{checkpoint}: {trained}; {images}", flush=True)
    # Paper: its released evaluation fits the PCA on all images; mean and direction of 32 numbers need far fewer.
    probe = Probe(model, ds, 10_000 if ds.name == "celeba" else 4_000 if args.quick else 20_000, args.seed)
    out.mkdir(parents=True, exist_ok=True)  # before the long part: if it cannot be made, say so now
    steps = min(ckpt["config"]["ddim_steps"], 20 if args.quick else math.inf)
    report = {"checkpoint": str(checkpoint), "dataset": ds.name, "source": ds.source, "images": images,
              "images_seen": ckpt["images_seen"], "minutes": ckpt["minutes"] and round(ckpt["minutes"], 2),
              "seed": args.seed, "quick": args.quick, "pca_images": len(probe.idx), "ddim_steps": steps,
              "scores": {}, "figures": [],
              # The value of a unit's best factor is what its anchors should separate.
              "separation": separation(model.dyga, probe.c, probe.factors[:, probe.nmi.argmax(0)], probe.active),
              "delta": mean_deltas(model.dyga, probe.c), "nmi": probe.nmi.round(4).tolist()}

    encode, interactive = Codes(model, ds, probe.pca), ""
    if "factorvae" in parts and not args.quick:
        encode(np.arange(len(ds)))  # its votes ask for most images anyway: once, in order, with one bar
    for name in [part for part in parts if part in METRICS]:
        function, quick_counts = METRICS[name]
        counts = {key: p.default for key, p in inspect.signature(function).parameters.items() if key[:2] == "n_"}
        counts |= quick_counts if args.quick else {}
        report["scores"] |= score_rows(name, lambda seed: function(encode, ds.factor_sizes, seed=seed, **counts),
                                       range(args.seed, args.seed + args.seeds), counts)
    if "tad" in parts:
        report["scores"] |= score_rows("tad", lambda seed: tad(probe.codes, probe.factors), [args.seed],
                                       {"images": len(probe.idx)})
    if inception:
        report["scores"] |= score_rows("fid", lambda seed: fid(model, ds, inception, args.fid, steps, seed),
                                       range(args.seed, args.seed + args.seeds),
                                       {"images": args.fid, "DDIM steps": steps})

    def write(name, text):
        with data.replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write("metrics.json", json.dumps(report, indent=1))  # the scores are safe, whatever becomes of the pictures
    rows = table(report)
    widths = [max(map(len, column)) for column in zip(*rows)]  # of each column
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows))
    if "figures" in parts:
        log = checkpoint.parent / "log.jsonl"
        report["figures"], interactive = draw_figures(model, ds, probe, args, steps, log, out)
        write("metrics.json", json.dumps(report, indent=1))
    write("index.html", page(report, ckpt["config"], out, interactive))
    print(*remarks(report), f"wrote {out / 'index.html'} (open it in a browser), metrics.json and "
          f"{len(report['figures'])} figures", sep="\n")

if __name__ == "__main__":
    data.run(main)
