"""The repository root is the package: the same flat files serve `import kimi_k26` and transformers' remote code."""

from setuptools import setup

setup(
    packages=["kimi_k26", "kimi_k26.cli"],
    package_dir={"kimi_k26": "."},
    package_data={"kimi_k26": ["chat_template.jinja"]},
)
