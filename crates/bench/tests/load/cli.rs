//! The program: exit codes, the report as JSON, and a lack of descriptors.

use crate::server::{self, BODY, Server};
use std::process::{Command, Output};

/// Runs `reuseportd-bench load` with at most so many open files.
fn load(open_files: u32, arguments: &str) -> Output {
    let script = format!("ulimit -n {open_files}; exec \"$0\" load {arguments}");
    Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_reuseportd-bench")]).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn exit_codes_tell_answered_lost_and_misused() {
    let server = Server::start(|mut stream| {
        server::request(&mut stream).unwrap();
        server::respond(&mut stream, BODY);
    });
    let good = load(256, &format!("{} --rate 200 --burst 10 --limit 30 --json", server.address));
    assert_eq!((good.status.code(), server.finish()), (Some(0), 30));
    let report = json(&good);
    assert_eq!(
        (&report["fates"]["answered"], &report["lost"], &report["valid"]),
        (&30.into(), &0.into(), &true.into())
    );

    let socket = server::bound(0);
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let lost = load(256, &format!("{address} --burst 10 --limit 10"));
    assert_eq!(lost.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&lost.stdout).contains("10 lost"));

    for misuse in ["", "127.0.0.1:9", "127.0.0.1:9 --rate -1", "127.0.0.1:9 --rate 1 --for 5"] {
        assert_eq!(load(256, misuse).status.code(), Some(2), "{misuse}");
    }
}

#[test]
fn a_lack_of_descriptors_is_the_generators_own_fault() {
    let listener = server::listener(0, 1024);
    let options = "--burst 40 --limit 40 --response-timeout 300ms --json";
    let output = load(20, &format!("{} {options}", listener.local_addr().unwrap()));
    let report = json(&output);
    assert_eq!((output.status.code(), &report["valid"]), (Some(1), &false.into()));
    let [own, waited] =
        ["local_error", "timeout_response"].map(|fate| report["fates"][fate].as_u64().unwrap());
    assert!(own >= 20 && own + waited == 40 && report["lost"] == waited, "{report}");
}
