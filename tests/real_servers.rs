//! Servers as they are installed, which know nothing of this program: the very configs in `examples/servers`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use reuseportd_wire::status::Outcome;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::rounds;
use crate::support::world::{Need, World, repository, world};

const EXAMPLES: &str = "examples/servers/";
/// The address of every example.
const ADDRESS: &str = "127.0.0.1:8080";

/// An example, and a mistake to make in one of its files.
struct Server {
    toml: &'static str,
    needs: &'static [Need],
    engines: &'static [&'static str],
    /// Whether its answers say which generation they come from.
    is_tagged: bool,
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
    /// What the reason for the rollback has to show of the server's own words.
    says: &'static str,
}

/// The examples moved into the test's directory, so that mistakes can be made in them and nothing is left behind.
fn copy(world: &World) -> String {
    let directory = world.path("servers/").to_str().unwrap().to_owned();
    fs::create_dir(&directory).unwrap();
    for entry in
        fs::read_dir(repository(EXAMPLES)).unwrap().map(Result::unwrap).filter(|e| e.path().is_file())
    {
        let text = fs::read_to_string(entry.path()).unwrap().replace(ADDRESS, &world.address.to_string());
        fs::write(Path::new(&directory).join(entry.file_name()), text).unwrap();
    }
    directory
}

/// The example's config as it is, but for places and names of this test.
fn app(world: &World, directory: &str, toml: &str, engine: &str) -> App {
    let text = fs::read_to_string(Path::new(directory).join(toml)).unwrap();
    let text = text
        .replace(EXAMPLES.trim_end_matches('/'), directory.trim_end_matches('/'))
        .replace("/run/", directory)
        .replace("\"node\"", &format!("{:?}", node()))
        .replace("[app]\n", &format!("[app]\nname = {:?}\n", world.app));
    let socket = world.path("run/control.sock");
    let own = format!("\n[steering]\nengine = {engine:?}\n[control]\nsocket = {socket:?}\n");
    let mut app = App::new(world, [""]);
    app.verbatim = Some(text + &own);
    app
}

/// Upgrades under load, one that fails, and another that does not: nothing is lost.
fn upgrades_lose_nothing(server: &Server) {
    world(server.needs, |world| {
        let directory = copy(world);
        for engine in server.engines {
            let master = Master::start(world, &app(world, &directory, server.toml, engine));
            let load = Load::start(spec(world).rate(400.0).burst(100, Duration::from_millis(500)).slow(10));
            for _ in 0..rounds(3, 5) {
                let to = master.upgrade().to.unwrap();
                if server.is_tagged {
                    load.answered_by(to);
                }
                load.answered(100);
            }
            let file = Path::new(&directory).join(server.file);
            let text = fs::read_to_string(&file).unwrap();
            assert!(text.contains(server.right), "{}", server.file);
            fs::write(&file, text.replace(server.right, server.wrong)).unwrap();
            let (code, receipt) = master.failing_upgrade();
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
            let reason = receipt.reason.unwrap();
            assert!(reason.contains(server.says), "{reason}");
            fs::write(&file, text).unwrap();
            load.answered(100);
            let report = load.end_lossless();
            assert_eq!(report.untagged == 0, server.is_tagged, "answers of this very server");
            master.stop();
        }
    });
}

/// Node as `.ci/run` installs it where the machine's own is older.
const NODE_HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/node_modules/.bin/node");

/// `reusePort` came with 23.1; older ones ignore it.
const NEW_NODE: Need =
    Need::Runs("node", &["-e", "process.exit(parseInt(process.versions.node) >= 23 ? 0 : 1)"]);

fn node() -> &'static str {
    if Path::new(NODE_HERE).exists() { NODE_HERE } else { "node" }
}

#[test]
fn nginx() {
    upgrades_lose_nothing(&Server {
        toml: "nginx.toml",
        needs: &[Need::Root, Need::Runs("nginx", &["-v"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: false,
        file: "nginx.conf",
        right: "return 200",
        wrong: "retrun 200",
        says: "unknown directive \"retrun\"",
    });
}

#[test]
fn gunicorn() {
    upgrades_lose_nothing(&Server {
        toml: "gunicorn.toml",
        needs: &[Need::Bpf, Need::Runs("gunicorn", &["--version"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "wsgi.py",
        right: "import os",
        wrong: "import oss",
        says: "No module named 'oss'",
    });
}

#[test]
fn uvicorn() {
    upgrades_lose_nothing(&Server {
        toml: "uvicorn.toml",
        needs: &[Need::Bpf, Need::Runs("uvicorn", &["--version"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "asgi.py",
        right: "import os",
        wrong: "import oss",
        says: "No module named 'oss'",
    });
}

#[test]
fn node_http() {
    upgrades_lose_nothing(&Server {
        toml: "node.toml",
        needs: if node() == NODE_HERE { &[Need::Bpf] } else { &[Need::Bpf, NEW_NODE] },
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "node.mjs",
        right: "const body",
        wrong: "constant body",
        says: "SyntaxError",
    });
}

#[test]
fn haproxy() {
    upgrades_lose_nothing(&Server {
        toml: "haproxy.toml",
        needs: &[Need::Bpf, Need::Runs("haproxy", &["-v"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "haproxy.cfg",
        right: "mode http",
        wrong: "mode htpp",
        says: "'htpp'",
    });
}

#[test]
fn caddy() {
    upgrades_lose_nothing(&Server {
        toml: "caddy.toml",
        needs: &[Need::Bpf, Need::Runs("caddy", &["version"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "caddy.json",
        right: "static_response",
        wrong: "static_repsonse",
        says: "static_repsonse",
    });
}

#[test]
fn puma() {
    upgrades_lose_nothing(&Server {
        toml: "puma.toml",
        needs: &[Need::Bpf, Need::Runs("puma", &["--version"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "puma.rb",
        right: "do |_environment|",
        wrong: "do |_environment",
        says: "syntax error",
    });
}

#[test]
fn java() {
    upgrades_lose_nothing(&Server {
        toml: "java.toml",
        needs: &[Need::Bpf, Need::Runs("java", &["--version"])],
        engines: &["ebpf", "cbpf"],
        is_tagged: true,
        file: "Server.java",
        right: "listener.accept()",
        wrong: "listener.acept()",
        says: "cannot find symbol",
    });
}
