# The image holds one static binary and nothing else.
#
#   docker build -t claude-lb .
#   docker run --rm -p 127.0.0.1:8000:8000 \
#     -v "$PWD/config.yaml:/etc/claude-lb/config.yaml:ro" \
#     -e CLAUDE_LB_KEY -e DATABRICKS_TOKEN_1 -e DATABRICKS_TOKEN_2 claude-lb

FROM rust:1.95-slim-bookworm AS build
# ring compiles a little C, against musl like everything else.
RUN apt-get update \
 && apt-get install -y --no-install-recommends musl-tools \
 && rm -rf /var/lib/apt/lists/* \
 && rustup target add "$(uname -m)-unknown-linux-musl"
ENV CC_x86_64_unknown_linux_musl=musl-gcc \
    CC_aarch64_unknown_linux_musl=musl-gcc
WORKDIR /build

# The dependencies alone, behind a stub: this layer stays until Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it tests/soak tests/simulation benches/proxies \
 && echo '//! Stub.' > src/lib.rs \
 && for stub in src tests/it tests/soak tests/simulation benches/proxies; do echo 'fn main() {}' > $stub/main.rs; done \
 && cargo build --locked --release --target "$(uname -m)-unknown-linux-musl"

# The program. `touch`, because the copied files may be older than the stub's build.
COPY src src
COPY config.yaml.example ./
RUN touch src/lib.rs src/main.rs \
 && cargo build --locked --release --target "$(uname -m)-unknown-linux-musl" \
 && cp "target/$(uname -m)-unknown-linux-musl/release/claude-lb" /claude-lb

FROM scratch
COPY --from=build /claude-lb /claude-lb
# `server` and `health` both find the configuration here.
ENV CONFIG_PATH=/etc/claude-lb/config.yaml
USER 65532:65532
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=2s CMD ["/claude-lb", "health"]
ENTRYPOINT ["/claude-lb"]
