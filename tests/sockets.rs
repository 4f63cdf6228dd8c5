//! `reuseportd sockets`: whose socket each is.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running};
use crate::support::world::{Need, World, world};

fn picture(done: &Done) -> Value {
    assert_eq!(done.code, 0, "{done:#?}");
    serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:#?}"))
}

/// The sockets of the only port.
fn sockets(picture: &Value) -> Vec<Value> {
    let ports = picture["ports"].as_array().unwrap();
    assert_eq!(ports.len(), 1, "{picture:#}");
    ports[0]["sockets"].as_array().unwrap().clone()
}

/// Pids that hold a socket.
fn owners(socket: &Value) -> Vec<u64> {
    socket["owners"].as_array().unwrap().iter().map(|owner| owner["pid"].as_u64().unwrap()).collect()
}

/// A listener of this process on that address.
fn stranger(address: SocketAddr) -> TcpListener {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(7).unwrap();
    socket.into()
}

#[test]
fn every_socket_has_its_worker_and_its_queue() {
    world(&[], |world| {
        // Each worker accepts one and is busy with it for longer than the test takes.
        let options = "--mode plain --inline --accept-delay 600000";
        let master = Master::start(world, &App::test_worker(world, options).workers(2));
        let pids = master.serving();
        let clients: Vec<_> = (0..5).map(|_| TcpStream::connect(world.address).unwrap()).collect();
        let shown = picture(&master.cli("sockets --json"));
        assert_eq!(shown["master"], master.pid());
        let mut seen = sockets(&shown);
        assert_eq!(seen.len(), 2, "{shown:#}");
        seen.sort_by_key(|socket| socket["seat"].as_u64());
        for (seat, (socket, pid)) in seen.iter().zip(&pids).enumerate() {
            assert_eq!(socket["relation"], "worker", "{socket:#}");
            assert_eq!((&socket["generation"], &socket["seat"]), (&1.into(), &seat.into()));
            assert_eq!(owners(socket)[0], u64::from(*pid), "{socket:#}");
            assert_eq!((&socket["listener"], &socket["backlog"]), (&"default".into(), &4096.into()));
            assert_eq!(
                (&socket["steered"], &socket["address"]),
                (&true.into(), &world.address.to_string().into())
            );
            let command = socket["owners"].to_string();
            assert!(command.contains("test_worker"), "{command}");
        }
        let queued: u64 = seen.iter().map(|socket| socket["accept_queue"].as_u64().unwrap()).sum();
        assert!((3..=5).contains(&queued), "{shown:#}");
        assert_eq!(shown["ports"][0]["strangers"], 0);
        assert_eq!(shown["ports"][0]["warnings"], serde_json::json!([]));
        let table = master.cli("sockets").stdout;
        for word in ["generation 1 seat 1", &pids[0].to_string(), "/4096", &world.address.to_string()] {
            assert!(table.contains(word), "{word:?} is not in\n{table}");
        }
        drop(clients);
    });
}

#[test]
fn children_of_a_worker_count_as_its_own() {
    world(&[], |world| {
        let script = format!("{} & wait", test_worker("--mode plain").join(" "));
        let app = App::new(world, ["/bin/sh", "-c", &script]).workers(1);
        let master = Master::start(world, &app);
        let shell = master.serving()[0];
        let seen = sockets(&picture(&master.cli("sockets --json")));
        assert_eq!((&seen[0]["relation"], &seen[0]["seat"]), (&"worker".into(), &0.into()), "{seen:#?}");
        assert!(!owners(&seen[0]).contains(&u64::from(shell)), "the child owns it: {seen:#?}");
        master.stop();
    });
}

#[test]
fn a_stranger_in_the_group_is_named() {
    world(&[], |world| {
        for engine in ["auto", "cbpf"] {
            let app = App::test_worker(world, "--mode plain").workers(1).engine(engine);
            let master = Master::start(world, &app);
            let _stranger = stranger(world.address);
            let shown = picture(&master.cli("sockets --json"));
            let seen = sockets(&shown);
            let strange = seen.iter().find(|socket| socket["relation"] == "stranger").expect("it is seen");
            assert_eq!(owners(strange), [u64::from(std::process::id())], "{shown:#}");
            assert_eq!((&strange["generation"], &strange["backlog"]), (&Value::Null, &7.into()));
            assert_eq!(shown["ports"][0]["strangers"], 1, "{shown:#}");
            let table = master.cli("sockets").stdout;
            assert!(table.contains("STRANGER") && table.contains("warning: strangers"), "{table}");
            master.stop();
        }
    });
}

#[test]
fn a_more_specific_address_is_told_with_what_it_takes() {
    world(&[], |world| {
        let port = world.address.port();
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        app.listen = vec![("default".into(), SocketAddr::from(([0, 0, 0, 0], port)))];
        let master = Master::start(world, &app);
        let thief = stranger(SocketAddr::from(([127, 0, 0, 1], port)));
        let shown = picture(&master.cli("sockets --json"));
        let seen = sockets(&shown);
        let taking = seen.iter().find(|socket| socket["relation"] == "stranger").expect("it is seen");
        assert_eq!(taking["takes_from"], serde_json::json!(["default"]), "{shown:#}");
        let table = master.cli("sockets").stdout;
        let said = table.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains("takes every connection to 127.0.0.1 away from default"), "{table}");
        // And so it does.
        let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        thief.accept().unwrap();
        drop(thief);
        master.stop();
    });
}

#[test]
fn without_a_master_the_config_is_enough() {
    world(&[], |world| {
        App::test_worker(world, "--mode plain").write();
        let sockets_of = |by: &str, path: &str| {
            let mut command = Command::new(REUSEPORTD);
            command.args(["sockets", "--json", by]).arg(world.path(path));
            Running::start(command).finish(PATIENCE)
        };
        let shown = picture(&sockets_of("--config", "app.toml"));
        assert!(sockets(&shown).is_empty() && shown["no_master"].is_string(), "{shown:#}");
        assert!(shown["ports"][0]["warnings"].to_string().contains("nobody listens"), "{shown:#}");
        let _unknown = stranger(world.address);
        let seen = sockets(&picture(&sockets_of("--config", "app.toml")));
        assert_eq!(seen[0]["relation"], "unknown", "nobody knows the workers: {seen:#?}");
        assert_eq!(owners(&seen[0]), [u64::from(std::process::id())]);
        assert_eq!(sockets_of("--socket", "run/control.sock").code, 3);
        std::fs::write(world.path("broken.toml"), "[app").unwrap();
        assert_eq!(sockets_of("--config", "broken.toml").code, 2);
    });
}

#[test]
fn what_an_ordinary_user_cannot_see_is_said() {
    world(&[Need::Root], |world: &World| {
        let program = world.path("reuseportd");
        std::fs::copy(REUSEPORTD, &program).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        App::test_worker(world, "--mode plain").write();
        let _hidden = stranger(world.address);
        let ask = |json: &[&str]| {
            let mut command = Command::new(&program);
            command.arg("sockets").args(json).arg("--config").arg(world.path("app.toml"));
            command.uid(61_234).gid(61_234);
            Running::start(command).finish(PATIENCE)
        };
        let shown = picture(&ask(&["--json"]));
        let seen = sockets(&shown);
        assert_eq!(
            (&seen[0]["owners"], &seen[0]["relation"]),
            (&Value::Null, &"unknown".into()),
            "{shown:#}"
        );
        assert_eq!(shown["ports"][0]["strangers"], Value::Null);
        let table = ask(&[]).stdout;
        assert!(table.contains("owner unknown"), "{table}");
    });
}
