// The server behind node.toml.
import { createServer } from "node:http";

const [host, port] = process.argv.slice(2);
const body = `generation=${process.env.REUSEPORTD_GENERATION} pid=${process.pid}\n`;
const server = createServer((_request, response) => {
  response.writeHead(200, { "Content-Type": "text/plain", "Content-Length": Buffer.byteLength(body) });
  response.end(body);
});

// Older versions don't know reusePort and ignore it: then the second process ends with EADDRINUSE.
server.listen({ host, port: Number(port), reusePort: true, backlog: 4096 });
process.on("SIGTERM", () => server.close(() => process.exit(0)));
