import json
from html.parser import HTMLParser

from smm_dp import RoundPrivacy, SkellamMixture
from smm_dp.report import privacy_report, write_report


class _Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text = ""

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        assert not any(name in ("src", "href") for name, _ in attrs)


def test_report_names_epsilon_order_assumptions_sampler_and_rates(tmp_path):
    m = SkellamMixture(63610, 4096.0, 64.0, 8, 1428.0, 240, 4)
    kind = RoundPrivacy(4096.0, 1428.0, 4, sampling_rate=0.004)
    report = privacy_report(m, kind, 1000, 1e-5, sampler="AES <ctr>", secure_source=True, aggregation="Z_m",
                            clip_rate=0.9, wrap_rate=0.01)  # fmt: skip
    paths = write_report(report, tmp_path)
    again = json.loads(paths[0].read_text())
    assert round(again["epsilon"], 6) == 2.998798
    assert again["order"] == 5
    assert again["mechanism"]["mu_each"] == 5.95
    assert again["observed"] == {"about": again["observed"]["about"], "clip_rate": 0.9, "wrap_rate": 0.01}
    assert "not covered by epsilon" in again["observed"]["about"]
    page = _Checker()
    page.feed(paths[1].read_text())
    assert "ε = 2.9988" in page.text
    assert "AES <ctr>" in page.text
    assert all(sentence in page.text for sentence in again["assumptions"])
    assert "protected" not in page.text.split("What has to be true")[0]


def test_a_simulation_says_that_it_protects_nobody(tmp_path):
    m = SkellamMixture(10, 100.0, 10.0, 8, 50.0, 5, 1)
    report = privacy_report(
        m, RoundPrivacy(100.0, 50.0, 1), 1, 1e-5, sampler="seed", secure_source=False, aggregation="none"
    )
    assert report["protects"] is False
    _, page = write_report(report, tmp_path)
    assert "nobody was protected" in page.read_text()
