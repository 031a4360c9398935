-- wrk's side of the HTTP measurement: the request, and what became of all of them as one line of JSON.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"type": "NOOP", "payload": {}}'

local clients = tonumber(os.getenv("CLIENTS") or "0")
if clients > 0 then
    local requests, last = {}, 0
    function init()
        for number = 0, clients - 1 do
            wrk.headers["X-Forwarded-For"] = string.format("10.0.%d.%d", math.floor(number / 256), number % 256)
            requests[number] = wrk.format()
        end
    end
    function request()
        last = (last + 1) % clients
        return requests[last]
    end
end

function done(summary, latency, requests)
    local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
    io.write(string.format(
        '\nRESULT {"requests": %d, "seconds": %f, "failed": %d, "p50": %f, "p99": %f}\n',
        summary.requests, summary.duration / 1e6, failed, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
    ))
end
