# make image IMAGE=registry/name
# docker run --gpus all --shm-size 16g -v "$PWD/ade20k:/data:ro" -v "$PWD/runs:/opt/deeplab/runs" registry/name \
#     composer main.py yamls/deeplabv3.yaml train_dataset.path=/data eval_dataset.path=/data
#
# --shm-size: loaders pass batches through shared memory. Docker's default of 64 MB is less than one batch.
# Folders for output, such as runs, must be writable for user 1000.

# CUDA's base image is enough, because torch's wheels bring the CUDA libraries.
FROM nvidia/cuda:13.2.0-base-ubuntu24.04

# Triton and Inductor compile during training. They need a C and C++ compiler and Python's headers.
# Versions are not pinned, because Ubuntu's archive keeps no old versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 1000 /opt/deeplab

# User 1000 is Ubuntu's own user "ubuntu".
USER 1000
WORKDIR /opt/deeplab

# Install before copying the code, so that code changes do not repeat the installation.
COPY --chown=1000:1000 Makefile install.sh pyproject.toml uv.lock ./
COPY --chown=1000:1000 wheels wheels
ARG WITH=""
RUN make install WITH="$WITH" && rm -rf ~/.cache
COPY --chown=1000:1000 . .

ENV PATH=/opt/deeplab/.venv/bin:$PATH
CMD ["python", "main.py", "--help"]
