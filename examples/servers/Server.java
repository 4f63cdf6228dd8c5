// The server behind java.toml: a thread for each connection.

import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.StandardSocketOptions;
import java.nio.ByteBuffer;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.Executors;

public final class Server {
    private static final String BODY =
            "generation=" + System.getenv("REUSEPORTD_GENERATION") + " pid=" + ProcessHandle.current().pid() + "\n";
    private static final byte[] RESPONSE = ("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: "
            + BODY.length() + "\r\n\r\n" + BODY).getBytes(StandardCharsets.US_ASCII);

    public static void main(String[] arguments) throws IOException {
        var address = new InetSocketAddress(arguments[0], Integer.parseInt(arguments[1]));
        var threads = Executors.newCachedThreadPool();
        try (var listener = ServerSocketChannel.open()) {
            listener.setOption(StandardSocketOptions.SO_REUSEPORT, true).bind(address, 4096);
            while (true) {
                var connection = listener.accept();
                threads.execute(() -> serve(connection));
            }
        }
    }

    private static void serve(SocketChannel connection) {
        try (connection) {
            var head = new StringBuilder();
            var bytes = ByteBuffer.allocate(4096);
            while (connection.read(bytes.clear()) >= 0) {
                head.append(StandardCharsets.ISO_8859_1.decode(bytes.flip()));
                if (head.indexOf("\r\n\r\n") >= 0) {
                    connection.write(ByteBuffer.wrap(RESPONSE));
                    head.setLength(0);
                }
            }
        } catch (IOException gone) {
            // The client has left; the others are served on.
        }
    }
}
