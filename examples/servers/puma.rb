# The server and the application behind puma.toml.

bind "tcp://127.0.0.1:8080"
threads 8, 8
quiet
raise_exception_on_sigterm false

app do |_environment|
  body = "generation=#{ENV["REUSEPORTD_GENERATION"]} pid=#{Process.pid}\n"
  [200, { "Content-Type" => "text/plain", "Content-Length" => body.bytesize.to_s }, [body]]
end

# activate.py leaves this to us. Here the application has been loaded.
Socket.for_fd(3).tap { |listener| listener.autoclose = false }.listen(4096)
