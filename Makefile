# What the README offers. Every target does its own set-up first and can be run again.
TARGET ?= $(shell uname -m)-unknown-linux-musl
CARGO ?= cargo
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help setup plugin build demo test fmt lint doc unit fences bench deny clean

help: ## Show the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

setup: ## Install what is missing: Debian packages, Rust toolchain and target.
	@tests/testkit/setup $(TARGET)

plugin: setup ## Build the stripped static plugin into dist/bin/.
	$(CARGO) build --release --locked -p crosslink --target $(TARGET)
	@install -D -m 0755 target/$(TARGET)/release/crosslink dist/bin/crosslink

build: plugin ## Build plugin and agent, stripped and static, into dist/bin/.
	$(CARGO) build --profile agent --locked -p crosslink-agent --target $(TARGET)
	@install -D -m 0755 target/$(TARGET)/agent/crosslink-agent dist/bin/crosslink-agent
	@ls -l dist/bin

demo: build ## Show a pod that reaches another cluster and follows its changes, in network namespaces.
	@$(CARGO) build --quiet --locked -p crosslink-testkit
	@tests/testkit/run target/debug/crosslink-testkit demo dist/bin

test: setup fmt lint doc unit fences ## Check format and lints, run unit, property and real-kernel tests, and the fences.
	@echo "make test: all passed"

fmt: setup
	$(CARGO) fmt --all --check

lint: setup
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --document-private-items

unit: setup
	$(CARGO) build --locked -p crosslink
	$(CARGO) test --workspace --locked --no-fail-fast

fences: build ## Check the plugin's dependencies, the layers, and the sizes of the binaries.
	@tests/testkit/fences $(TARGET) dist/bin

bench: setup ## Measure how soon running pods follow a change, and the agent with 5,000 remote clusters.
	$(CARGO) build --locked --profile agent -p crosslink --target $(TARGET)
	$(CARGO) bench --locked --profile agent -p crosslink-agent --target $(TARGET) --bench live
	@if [ -n "$$KUBEBUILDER_ASSETS" ]; then $(CARGO) test --locked --profile agent -p crosslink-agent --target $(TARGET) \
	    --test agent_source_many five_thousand -- --nocapture; \
	else echo "KUBEBUILDER_ASSETS is not set: the agent with 5,000 remote clusters was not measured"; fi

deny: setup ## Check licences, duplicate and banned dependencies, and advisories where they can be fetched.
	@tests/testkit/deny

clean: ## Remove what was built.
	rm -rf target dist
