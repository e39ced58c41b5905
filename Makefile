# make run and make test are all that is needed; both install what they lack.
# PG_BIN=/usr/lib/postgresql/17/bin chooses another PostgreSQL for any of them.

.PHONY: run test test-browser lint bench image

SPECTRAL    = @stoplight/spectral-cli@6.16.3
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# need checks for a program and installs the package that has it:
# $(call need,program,package of apt-get dnf apk,of brew)
need = PATH="$$PATH:$(PG_BIN):$$(printf %s: /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin /usr/sbin)"; \
	command -v $(1) >/dev/null || { echo "Installing $(2), which has $(1)."; $(call install,$(2),$(3)); }
sudo    = $$([ "$$(id -u)" = 0 ] || echo sudo)
install = if command -v brew >/dev/null; then brew install $(2); \
	elif command -v apt-get >/dev/null; then $(sudo) apt-get update -q && $(sudo) apt-get install -yq --no-install-recommends $(1); \
	elif command -v dnf >/dev/null; then $(sudo) dnf install -y $(1); \
	elif command -v apk >/dev/null; then $(sudo) apk add $(1); \
	else echo "No package manager is known here: install $(1) by hand."; exit 1; fi

# run serves on localhost:8080, on a private PostgreSQL unless DATABASE_URL is set.
run:
	@[ -n "$$DATABASE_URL" ] || { $(call need,initdb,postgresql,postgresql); }
	@go build -o tasks . && exec ./tasks

# test runs all tests, and those of the API once more through PgBouncer.
test:
	@$(call need,initdb,postgresql,postgresql)
	@$(call need,pgbouncer,pgbouncer,pgbouncer)
	go test -race ./...
	TASKS_TEST_POOLER=1 go test -race -run "$$(sed -n 's/^func \(Test[^(]*\)(t .*/^\1$$/p' handler_test.go | paste -sd '|' -)" ./...

# test-browser drives the documentation page in Chromium.
test-browser:
	@$(call need,initdb,postgresql,postgresql)
	@$(call need,chromedriver,chromium chromium-driver,chromedriver)
	@$(call need,chromium,chromium,chromium)
	go test -tags browser -run Browser -count=1 .

# lint checks the code, for all the systems that it builds on, and openapi.json.
lint:
	@$(call need,npx,npm,node)
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted"; exit 1; }
	go vet -tags browser ./...
	for os in linux darwin windows; do for arch in amd64 arm64; do GOOS=$$os GOARCH=$$arch go build -o /dev/null . || exit 1; done; done
	go run $(STATICCHECK) -tags browser ./...
	d=$$(mktemp -d) && trap 'rm -r "$$d"' EXIT && echo '{"extends": "spectral:oas"}' >"$$d/oas.json" && \
		npx --yes $(SPECTRAL) lint openapi.json --ruleset "$$d/oas.json" --fail-severity=hint

# bench measures each operation over HTTP beside what it stands on.
bench:
	@$(call need,initdb,postgresql,postgresql)
	go test -run '^$$' -bench 'Tasks|Health|Encode' -benchtime 1s -timeout 60m .

# image builds the container image.
image:
	buildah build --format docker -t tasks .
