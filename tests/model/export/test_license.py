"""The license of a checkpoint follows from the weights that its training began from."""

from model.export.license import ORIGINAL_BASE, license_of


def test_the_license_is_that_of_the_first_weights() -> None:
    def license_for(name: str, pretrained: bool, **data: object):
        return license_of(
            {"recipe": {"network": {"name": name, "pretrained": pretrained}}, "data": data}
        )

    known = license_for("convnextv2_base.fcmae_ft_in22k_in1k", True)
    assert known.id == "cc-by-nc-4.0" and known.base == "convnextv2_base.fcmae_ft_in22k_in1k"
    unknown = license_for("convnextv2_base", False)
    assert (
        unknown.id == "cc-by-nc-4.0" and not unknown.base and " if training started" in unknown.text
    )
    original = license_for("convnextv2_base", False, imported_from="checkpoint_phase2.pth")
    assert original.base == ORIGINAL_BASE and "its card says MIT" in original.text
    assert license_for("mobilenetv2_100", True).id == "apache-2.0"
    timm_s = {"kind": "timm", "name": "mobilenetv2_100", "license": "apache-2.0"}
    other = {"kind": "random", "name": "", "license": None}
    for first, id, base in (
        (timm_s, "apache-2.0", "mobilenetv2_100"),
        (
            {"kind": "checkpoint", "name": "a/step_1", "first_weights": timm_s},
            "apache-2.0",
            "mobile",
        ),
        (other, "other", ""),
        ({"kind": "checkpoint", "name": "a/step_1", "first_weights": other}, "other", ""),
        ({"kind": "checkpoint", "name": "a/step_1", "first_weights": None}, "cc-by-nc-4.0", ""),
        ({"kind": "file", "name": "x.safetensors", "license": None}, "cc-by-nc-4.0", ""),
    ):
        network = {"name": "convnextv2_base", "pretrained": False}
        meta = {"recipe": {"network": network}, "data": {}, "first_weights": first}
        license = license_of(meta)
        assert license.id == id and license.base.startswith(base), first
        assert bool(license.base) == bool(base)
