# make image IMAGE=registry/name
# docker run --gpus all --shm-size 16g -v "$PWD/ade20k:/data:ro" -v "$PWD/runs:/opt/deeplab/runs" registry/name \
#     composer main.py yamls/deeplabv3.yaml train_dataset.path=/data eval_dataset.path=/data
#
# --shm-size: the loaders hand batches over in shared memory, of which Docker gives 64 MB, less than one batch.
# A folder to write to, as runs here, has to be writable for user 1000.

# CUDA's runtime alone: torch's wheel brings the libraries.
FROM nvidia/cuda:13.0.0-base-ubuntu24.04

# A compiler and Python's headers: for mmcv-full, and for Triton and Inductor, which compile while training.
# Ubuntu's archive keeps no old versions that could be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 1000 /opt/deeplab

# Ubuntu's own "ubuntu".
USER 1000
WORKDIR /opt/deeplab

# Before the code, so that a change of that does not install again.
COPY --chown=1000:1000 Makefile install.sh pyproject.toml uv.lock ./
ARG WITH=""
RUN make install WITH="$WITH" && rm -rf ~/.cache
COPY --chown=1000:1000 . .

ENV PATH=/opt/deeplab/.venv/bin:$PATH
CMD ["python", "main.py", "--help"]
