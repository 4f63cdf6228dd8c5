//! Sockets that the master was started with (LISTEN_FDS): found, served by all workers, and left as they are.

use std::fs;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

use reuseportd_wire::status::{Bind, Engine, ListenerStatus, Protocol};

use crate::orphans::{kill_with_keeper, replaced};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::processes_of;
use crate::support::unix_load::ask;
use crate::support::world::{Need, World, world};

/// Makes the sockets of its arguments (`tcp:`, `udp:` or `unix:` and the address), as a service manager does, and becomes
/// the command behind `--`.
const PASSER: &str = r#"
import os, socket, sys
at = sys.argv.index("--")
passed = []
for one in sys.argv[1:at]:
    kind, address = one.split(":", 1)
    if kind == "unix":
        if os.path.exists(address):
            os.unlink(address)
        made = socket.socket(socket.AF_UNIX)
        made.bind(address)
    else:
        host, port = address.rsplit(":", 1)
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        if kind == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, int(port)))
    if kind != "udp":
        made.listen(128)
    passed.append(os.dup(made.fileno()))
high = [os.dup2(fd, 100 + i, inheritable=False) for i, fd in enumerate(passed)]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True)
os.environ["LISTEN_FDS"] = str(len(high))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[at + 1], sys.argv[at + 1:])
"#;

/// A master that is given these sockets, under these names.
fn passer(names: &str, sockets: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", PASSER]).args(sockets).args(["--", REUSEPORTD]);
    command.env("LISTEN_FDNAMES", names);
    command
}

fn start<'a>(world: &'a World, app: &App, names: &str, sockets: &[&str]) -> Master<'a> {
    let mut master = Master::launch(world, app, passer(names, sockets));
    master.wait_ready();
    master
}

fn activated(world: &World) -> App {
    App::test_worker(world, "--mode activated").workers(2)
}

fn listener(master: &Master, name: &str) -> ListenerStatus {
    let mut all = master.status().listeners.into_iter();
    all.find(|one| one.name == name).unwrap_or_else(|| panic!("no {name}: {:?}", master.status().listeners))
}

/// How many listening TCP sockets there are on a port of this network namespace.
fn listening_on(port: u16) -> usize {
    let wanted = format!(":{port:04X}");
    let table = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let (v4, v6) = (table("tcp"), table("tcp6"));
    let fields = v4.lines().chain(v6.lines()).map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields.filter(|fields| fields[1].ends_with(&wanted) && fields[3] == "0A").count()
}

#[test]
fn sockets_of_all_kinds_are_matched_and_served() {
    world(&[Need::Python, Need::Root], |world| {
        let path = world.path("passed.sock");
        let mut app = activated(world);
        app.listen.push(("named".into(), SocketAddr::from(([127, 0, 0, 2], 8090))));
        app.listen.push(("wide".into(), "0.0.0.0:8091".parse().unwrap()));
        app.listen.push(("own".into(), "127.0.0.1:8092".parse().unwrap()));
        app.listen.push(("dns".into(), "127.0.0.1:8093".parse().unwrap()));
        app.listen_lines.push((Some("dns"), "protocol = \"udp\""));
        let app = app.unix("local", &path, "mode = \"0600\"");
        let unix = format!("unix:{}", path.display());
        let tcp = format!("tcp:{}", world.address);
        let sockets = [
            tcp.as_str(),
            "tcp:127.0.0.1:8094",
            "tcp:[::]:8091",
            "udp:127.0.0.1:8093",
            &unix,
            "tcp:127.0.0.1:8099",
        ];
        let master = start(world, &app, "web.socket:named:web.socket:d:u:nobody", &sockets);
        for (name, protocol) in [
            ("default", Protocol::Tcp),
            ("named", Protocol::Tcp),
            ("wide", Protocol::Tcp),
            ("dns", Protocol::Udp),
            ("local", Protocol::Tcp),
        ] {
            let one = listener(&master, name);
            assert_eq!(
                (one.bind, one.engine, one.protocol),
                (Bind::Master, Engine::None, protocol),
                "{one:?}"
            );
            assert!(one.engine_reason.contains("from the service manager"), "{one:?}");
        }
        assert_ne!(listener(&master, "own").engine, Engine::None, "made by the master, and steered");
        assert_eq!(listener(&master, "local").address, unix);
        assert_eq!((listening_on(8091), listening_on(8092)), (1, 2), "one for all, and one for each seat");
        let log = master.log();
        assert!(log.contains("passed a socket on 127.0.0.1:8099 (nobody), and no [[listen]]"), "{log}");
        // No worker has any other descriptor, nor any of the master's variables.
        let pid = master.serving()[0];
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        for variable in [
            format!("LISTEN_PID={pid}"),
            "LISTEN_FDS=6".into(),
            "LISTEN_FDNAMES=default:named:wide:own:dns:local".into(),
        ] {
            assert!(environment.split('\0').any(|one| one == variable), "{variable}: {environment:?}");
        }
        let holds = |port: &str| {
            let inode = fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
            let line = inode
                .lines()
                .find(|line| line.contains(port))
                .unwrap()
                .split_whitespace()
                .nth(9)
                .unwrap()
                .to_owned();
            let held = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            held.filter_map(|one| fs::read_link(one.unwrap().path()).ok())
                .any(|link| link.ends_with(format!("socket:[{line}]")))
        };
        assert!(holds(":1F90") && !holds(":1FA3"), "8080, but not 8099");
        assert!(TcpStream::connect("127.0.0.1:8094").is_ok());
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", "127.0.0.1:8093").unwrap();
        master.stop();
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket(), "it is the service manager's");
    });
}

#[test]
fn upgrades_crashes_and_reexecs_keep_it() {
    world(&[Need::Python, Need::Root], |world| {
        let tcp = format!("tcp:{}", world.address);
        let mut master = start(world, &activated(world), "web", &[&tcp]);
        let load = Load::start(spec(world).rate(300.0).slow(10));
        for generation in 2..=3 {
            master.upgrade();
            load.answered_by(generation);
        }
        assert_eq!(master.cli("reexec").code, 0);
        master.upgrade();
        load.answered_by(4);
        // It goes and comes back with the [[listen]] that asks for it.
        let mut other = activated(world);
        other.listen = vec![("other".into(), "127.0.0.1:8095".parse().unwrap())];
        other.write();
        master.upgrade();
        assert!(!master.status().listeners.iter().any(|one| one.name == "default"));
        assert_eq!(master.cli("rollback --wait").code, 0);
        load.answered_by(6);
        activated(world).write();
        master.kill();
        load.answered(50);
        master.restart();
        master.wait_adopted();
        master.upgrade();
        load.answered_by(7);
        assert_eq!(listening_on(world.address.port()), 1, "the same all the time");
        let report = load.end();
        assert_eq!(report.lost(), 0, "{report}\n{}", master.log());
        master.stop();
    });
}

#[test]
fn what_can_not_be_is_refused() {
    world(&[Need::Python], |world| {
        let tcp = format!("tcp:{}", world.address);
        let refused = |app: &App, said: &str| {
            let mut master = Master::launch(world, app, passer("web", &[&tcp]));
            assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
            assert!(master.log().contains(said), "{}", master.log());
            master.ended(1);
        };
        refused(
            &App::test_worker(world, "--mode plain"),
            "beside which workers can't bind: set bind = \"master\"",
        );
        refused(&activated(world).readiness("listen"), "the service manager passed all its sockets");
        // What is meant for another process is none of ours.
        let mut other = Command::new("env");
        other.args(["LISTEN_PID=1", "LISTEN_FDS=1", REUSEPORTD]);
        let mut master = Master::launch(world, &activated(world), other);
        master.wait_ready();
        assert_ne!(listener(&master, "default").engine, Engine::None);
        master.stop();
    });
}

#[test]
fn with_the_keeper_dead_too_its_path_is_still_the_same() {
    world(&[Need::Python, Need::Root], |world| {
        let path = world.path("passed.sock");
        let script = crate::support::world::repository("examples/activated.py");
        let mut app = App::new(world, ["python3", script.to_str().unwrap()]).workers(2);
        app.listen.clear();
        let app = app.unix("local", &path, "");
        let unix = format!("unix:{}", path.display());
        let mut master = start(world, &app, "local", &[&unix]);
        let orphans: Vec<u32> = master.serving();
        kill_with_keeper(world, &mut master);
        assert!(processes_of(&world.app).len() >= 2);
        // The next one is not given it: it takes it from the workers.
        replaced(&mut master, &orphans);
        assert!(ask(Path::new(&path), "x\n").unwrap().contains("generation=2 "));
        master.stop();
    });
}
