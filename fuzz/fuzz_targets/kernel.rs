//! What the kernel answers: sock_diag, and files of /proc.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reuseportd_sys::{diag, procfs};

fuzz_target!(|answer: &[u8]| {
    let mut sockets = Vec::new();
    let _ = diag::parse(answer, &mut sockets);
    assert!(sockets.len() <= answer.len() / 88, "more sockets than fit");
    for (name, value) in procfs::variables_in(answer) {
        assert!(name.len() + value.len() < answer.len());
    }
    let text = String::from_utf8_lossy(answer);
    if let Some(process) = procfs::parse_stat(&text) {
        let all = [process, process];
        let _ = procfs::descendants_in(&all, process.parent, process.group);
    }
    let _ = procfs::netstat_in(&text, "TCPMigrateReqSuccess");
    let _ = procfs::socket_inode(&text);
});
