//! Servers as they are installed, which know nothing of this program, under the very configs in `examples/servers`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::Outcome;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::rounds;
use crate::support::world::{Need, World, repository, world};

const EXAMPLES: &str = "examples/servers";
/// The address in all of them.
const ADDRESS: &str = "127.0.0.1:8080";
/// Node as `.ci/run` installs it where the machine's own is too old.
const OUR_NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/node_modules/.bin/node");

/// An example, and a mistake to make in it.
struct Server {
    name: &'static str,
    program: Need,
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
    /// What the reason for the rollback has to show of the server's own words.
    says: &'static str,
}

/// Four hundred new connections a second, bursts on top, and clients that the server would cut if it were stopped
/// while they are connected.
fn load(world: &World) -> Spec {
    let mut spec = spec(world).rate(400.0).burst(100, Duration::from_millis(500)).slow(10);
    spec.keep_alive_requests = 25;
    spec.keep_alive(10, Duration::from_millis(20))
}

/// The examples in a directory of the test's, so that mistakes can be made in them and nothing is left behind.
pub(crate) fn copy(world: &World) -> PathBuf {
    let directory = world.path("servers");
    fs::create_dir(&directory).unwrap();
    let files = fs::read_dir(repository(EXAMPLES)).unwrap().map(|entry| entry.unwrap().path());
    for file in files.filter(|path| path.is_file()) {
        let text = fs::read_to_string(&file).unwrap().replace(ADDRESS, &world.address.to_string());
        fs::write(directory.join(file.file_name().unwrap()), text).unwrap();
    }
    directory
}

/// The example's config as it is, but for the places and names of this test.
pub(crate) fn app(world: &World, directory: &Path, name: &str, engine: &str) -> App {
    let text = fs::read_to_string(directory.join(name).with_extension("toml")).unwrap();
    let directory = directory.to_str().unwrap();
    let text = text
        .replace(EXAMPLES, directory)
        .replace("/run/", &format!("{directory}/"))
        .replace("\"node\"", &format!("{:?}", node()))
        .replace("[app]\n", &format!("[app]\nname = {:?}\n", world.app));
    let socket = world.path("run/control.sock");
    let own = format!("\n[steering]\nengine = {engine:?}\n[control]\nsocket = {socket:?}\n");
    let mut app = App::new(world, [""]);
    app.verbatim = Some(text + &own);
    app
}

/// Upgrades under load, one of which fails, with both engines.
fn upgrades_lose_nothing(server: &Server) {
    world(&[Need::Root, Need::Bpf, server.program], |world| {
        let directory = copy(world);
        // nginx has no way to say it.
        let says_generation = server.name != "nginx";
        for engine in ["ebpf", "cbpf"] {
            let master = Master::start(world, &app(world, &directory, server.name, engine));
            let load = Load::start(load(world));
            for _ in 0..rounds(3, 5) {
                let generation = master.upgrade().to.unwrap();
                if says_generation {
                    load.answered_by(generation);
                }
                load.answered(100);
            }
            fails(server, &master, &directory.join(server.file));
            load.answered(100);
            let report = load.end_lossless();
            assert_eq!(report.untagged == 0, says_generation, "answers of this very server");
            master.stop();
        }
    });
}

/// An upgrade to a generation with the mistake.
fn fails(server: &Server, master: &Master, file: &Path) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(server.right), "{text}");
    fs::write(file, text.replace(server.right, server.wrong)).unwrap();
    let (code, receipt) = master.failing_upgrade();
    assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
    let reason = receipt.reason.unwrap();
    assert!(reason.contains(server.says), "{reason}");
    fs::write(file, text).unwrap();
}

fn node() -> &'static str {
    if Path::new(OUR_NODE).exists() { OUR_NODE } else { "node" }
}

#[test]
fn nginx() {
    upgrades_lose_nothing(&Server {
        name: "nginx",
        program: Need::Runs("nginx", &["-v"]),
        file: "nginx.conf",
        right: "return 200",
        wrong: "retrun 200",
        says: "unknown directive \"retrun\"",
    });
}

#[test]
fn gunicorn() {
    upgrades_lose_nothing(&Server {
        name: "gunicorn",
        program: Need::Runs("gunicorn", &["--version"]),
        file: "wsgi.py",
        right: "import os",
        wrong: "import oss",
        says: "No module named 'oss'",
    });
}

#[test]
fn uvicorn() {
    upgrades_lose_nothing(&Server {
        name: "uvicorn",
        program: Need::Runs("uvicorn", &["--version"]),
        file: "asgi.py",
        right: "import os",
        wrong: "import oss",
        says: "No module named 'oss'",
    });
}

#[test]
fn node_http() {
    const IS_NEW: &str =
        "if (parseInt(process.versions.node) < 23) throw Error('reusePort needs Node 23.1 or later')";
    upgrades_lose_nothing(&Server {
        name: "node",
        program: Need::Runs(node(), &["-e", IS_NEW]),
        file: "node.mjs",
        right: "const body",
        wrong: "constant body",
        says: "SyntaxError",
    });
}

#[test]
fn haproxy() {
    upgrades_lose_nothing(&Server {
        name: "haproxy",
        program: Need::Runs("haproxy", &["-v"]),
        file: "haproxy.cfg",
        right: "mode http",
        wrong: "mode htpp",
        says: "'htpp'",
    });
}

#[test]
fn caddy() {
    upgrades_lose_nothing(&Server {
        name: "caddy",
        program: Need::Runs("caddy", &["version"]),
        file: "caddy.json",
        right: "static_response",
        wrong: "static_repsonse",
        says: "static_repsonse",
    });
}

#[test]
fn puma() {
    upgrades_lose_nothing(&Server {
        name: "puma",
        program: Need::Runs("puma", &["--version"]),
        file: "puma.rb",
        right: "do |_environment|",
        wrong: "do |_environment",
        says: "syntax error",
    });
}

#[test]
fn java() {
    upgrades_lose_nothing(&Server {
        name: "java",
        program: Need::Runs("javac", &["--version"]),
        file: "Server.java",
        right: "listener.accept()",
        wrong: "listener.acept()",
        says: "cannot find symbol",
    });
}
