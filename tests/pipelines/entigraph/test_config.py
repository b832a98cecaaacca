"""What a page of this pipeline must not say."""

import pytest

from selfimprove_jax.pipelines.entigraph import Config
from selfimprove_jax.runtime.config import parse

_ARM = {"corpora": {"raw": 1.0}, "target_tokens": 900}
_ENDPOINT = {"kind": "endpoint", "url": "https://host/v1", "endpoint": {"model": "some-model"}}


def test_the_page_is_accepted(values):
  assert parse(Config, values).arms.keys() == {"raw", "entigraph", "half", "stopped"}


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (
      {"arms": {"one": _ARM | {"corpora": {"spa": 1.0}}}},
      r"arms\.one trains on 'spa'.* raise synthesis\.spa_samples above 0",
    ),
    ({"arms": {"one": _ARM | {"corpora": {"qa": 1.0}}}}, r"'qa', which the synthesis does not"),
    ({"arms": {"one": _ARM | {"early_stopping": "focal"}}}, r"synthesis\.focal_samples above 0"),
    ({"synthesis__rephrase_samples": 0}, r"arms\.stopped .*'rephrase'.*rephrase_samples above 0"),
    ({"arms": {"one": _ARM | {"early_stopping": "raw"}}}, "is a corpus that the arm trains on"),
    (
      {"arms": {"one": _ARM | {"target_tokens": 127}}},
      r"arms\.one\.target_tokens=127 must be .*128",
    ),
    ({"arms": {"initial": _ARM}}, r"arms\.initial: an arm needs a name"),
    ({"arms": {"a/b": _ARM}}, r"arms\.a/b: an arm needs a name without slashes"),
    ({"generator": _ENDPOINT}, r"give the prices of some-model .* or set is_free=True"),
    ({"generator": _ENDPOINT | {"endpoint": {}}}, r"endpoint\.model='' must name the model"),
  ],
)
def test_a_page_that_cannot_work_is_refused(changed, changes, told):
  with pytest.raises(ValueError, match=told):
    parse(Config, changed(**changes))


def test_an_endpoint_with_a_price_or_declared_free_is_accepted(changed):
  priced = {"model": "some-model", "output_usd_per_million": 1.0}
  parse(Config, changed(generator=_ENDPOINT | {"endpoint": priced}))
  parse(Config, changed(generator=_ENDPOINT | {"is_free": True}))
