"""The repository root is the package: the same flat files serve `import kimi_k26` and transformers' remote code."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Leaves out this file, which stands among the package's modules and is none of them."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    packages=["kimi_k26", "kimi_k26.cli", "kimi_k26.cli.serve"],
    package_dir={"kimi_k26": "."},
    package_data={"kimi_k26": ["chat_template.jinja"]},
    cmdclass={"build_py": BuildPackage},
)
