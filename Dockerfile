# onnxneutrino and nothing else. Works on the folder that is mounted at /models:
#   docker build -t onnxneutrino .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/models" onnxneutrino compress in.onnx out.onnx --delta 1
FROM python:3.11-slim

COPY pyproject.toml README.md LICENSE /src/
COPY onnxneutrino /src/onnxneutrino
COPY passes /src/passes
RUN pip install --no-cache-dir /src && rm -rf /src

# Any user may run it, so nothing is kept at home: matplotlib's cache goes where everybody may write.
RUN useradd --create-home neutrino && mkdir /models && chown neutrino /models
ENV MPLCONFIGDIR=/tmp/matplotlib
USER neutrino
WORKDIR /models
ENTRYPOINT ["onnxneutrino"]
CMD ["--help"]
