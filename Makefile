# Every command of the project. The long ones live in build/.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PKG ?= ./...
RUN ?= .
COUNT ?= 50
BENCH ?= .
FUZZTIME ?= 30s

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: test
test: ## every test of every module, race detector on, real servers required
	@build/test.sh

.PHONY: test-servers
test-servers: ## the real-server tests on Valkey 8 and Redis 8: make test-servers RUN=TestName
	@RUN='$(RUN)' PKG='$(if $(filter file,$(origin PKG)),,$(PKG))' build/test-servers.sh

.PHONY: lint
lint: ## the linters of .golangci.yml over every module
	@build/check.sh lint

.PHONY: check
check: ## the cheap gates: format, vet, tidy, build, lint, documents, vulnerabilities
	@build/deps.sh check
	@build/check.sh

.PHONY: soak
soak: ## a million operations against the referee, 1,000 simulated histories, then the same tests many times: make soak RUN=TestName PKG=./internal/x COUNT=50
	@build/deps.sh test
ifeq ($(origin RUN) $(origin PKG),file file)
	RINGFENCE_DIFFERENTIAL_OPS=1000000 go test -race -count=1 -timeout=60m -v -run '^TestScriptsOnRedisAgreeWithTheReferee' .
	cd internal/histories && GOWORK=off RINGFENCE_SIM_SEEDS=1000 go test -race -count=1 -timeout=60m -v -run '^TestSimulated' .
endif
	$(if $(filter file,$(origin RUN)),RINGFENCE_DIFFERENTIAL_OPS=5000 )go test -race -count=$(COUNT) -failfast -shuffle=on -timeout=60m -run '$(RUN)' $(PKG)

.PHONY: chaos
chaos: ## every fault of docs/faults.md on real servers: make chaos FAULT=kill,stop AGAIN=1
	@build/deps.sh test
	@mkdir -p .cache
	@go build -o .cache/chaos-command ./chaos
	@.cache/chaos-command -fault '$(FAULT)' $(if $(AGAIN),-again)

.PHONY: bench
bench: ## ringfence beside its rivals, into docs/benchmarks.md: make bench ARGS='-short'
	@build/deps.sh test
	cd bench && GOWORK=off go run -buildvcs=false . -dir .. $(ARGS)

.PHONY: microbench
microbench: ## Go benchmarks: make microbench BENCH=Allow PKG=. COUNT=10
	@build/deps.sh test
	$(if $(filter ./bench,$(PKG)),cd bench && GOWORK=off )go test -run '^$$' -bench '$(BENCH)' -benchmem -count=$(if $(filter file,$(origin COUNT)),1,$(COUNT)) $(if $(filter ./bench,$(PKG)),.,$(PKG))

.PHONY: fuzz
fuzz: ## every fuzz target in turn: make fuzz FUZZTIME=5m
	@build/fuzz.sh '$(FUZZTIME)'

.PHONY: demo
demo: ## a ring, an outage and the answers, in one terminal
	@go run ./cmd/ringfence demo

.PHONY: deps
deps: ## install the programs from outside Go that are missing
	@build/deps.sh

.PHONY: pictures
pictures: ## the dashboards as pictures in docs/, calm and in an incident (needs node, npm, chromium)
	@build/deps.sh pictures
	cd observability && GOWORK=off go generate ./... && GOWORK=off go test -tags pictures -count=1 -timeout=15m -run '^TestPictures$$' .
