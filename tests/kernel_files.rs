//! Namespaces, locks, capabilities and node-local files.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

#[path = "support/bed.rs"]
mod bed;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use bed::Bed;
use crosslink_core::record::NetnsId;
use crosslink_kernel::{
    Error, Kernel, System,
    files::{Durability, read_trusted, write_atomic},
    netns::{Netns, identify, require_capabilities},
};
use crosslink_testkit::{Netns as TestNetns, in_netns};

#[test]
fn one_namespace_by_two_paths_is_the_same() {
    let (one, other) = (TestNetns::create("one"), TestNetns::create("other"));
    let dir = tempfile::tempdir().unwrap();
    symlink(one.path(), dir.path().join("link")).unwrap();
    fs::write(dir.path().join("bound"), "").unwrap();
    let bound = dir.path().join("bound");
    let mount = Command::new("mount").arg("--bind").arg(one.path()).arg(&bound).status().unwrap();
    assert!(mount.success());
    let id = identify(one.path()).unwrap();
    assert!(id.cookie.is_some_and(|cookie| cookie != 0));
    assert_eq!((id.inode, id.path.as_path()), (fs::metadata(one.path()).unwrap().ino(), one.path()));
    for path in [&dir.path().join("link"), &bound] {
        let again = identify(path).unwrap();
        assert!(again.same(&id) && again.path == *path, "{again:?}");
    }
    assert!(!identify(other.path()).unwrap().same(&id));
    assert!(Command::new("umount").arg(&bound).status().unwrap().success());
    assert_eq!(identify(&bound), None, "a plain file");
    assert_eq!(identify("/proc/self/ns/net".as_ref()), None, "the own one");
    assert_eq!(identify("/run/netns/nothing".as_ref()), None);
    // The cookie says more than the inode, whatever the path.
    let reused = NetnsId { cookie: Some(1), ..id.clone() };
    assert!(!reused.same(&id));
}

#[test]
fn a_namespace_that_reuses_an_inode_is_another_one() {
    for _ in 0..500 {
        let old = TestNetns::create("old");
        let id = identify(old.path()).unwrap();
        drop(old);
        let new = TestNetns::create("new");
        let now = identify(new.path()).unwrap();
        assert!(!now.same(&id), "{now:?} {id:?}");
        if now.inode == id.inode {
            return;
        }
    }
    println!("no inode was reused in 500 tries: the machine is busy with namespaces");
}

#[test]
fn what_is_no_sandbox_is_told_by_kind() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, fifo) = (dir.path().join("plain"), dir.path().join("fifo"));
    fs::write(&plain, "").unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    symlink("loop", dir.path().join("loop")).unwrap();
    let started = Instant::now();
    for path in [plain.as_path(), &fifo, dir.path(), "/dev/null".as_ref(), "/proc/self/status".as_ref()] {
        let err = Netns::open(path).unwrap_err();
        assert!(matches!(&err, Error::NotNetns(at) if at == path) && err.is_gone(), "{err:?}");
    }
    for path in ["/proc/self/ns/net", "/proc/thread-self/ns/net"] {
        let err = Netns::open(path.as_ref()).unwrap_err();
        assert!(matches!(err, Error::OwnNetns(_)) && err.is_gone(), "{err:?}");
    }
    for path in
        [dir.path().join("missing"), plain.join("below"), dir.path().join("loop"), "/proc/999999999/ns/net".into()]
    {
        let err = Netns::open(&path).unwrap_err();
        assert!(matches!(err, Error::File { .. }) && err.is_gone(), "{err:?}");
    }
    // A namespace, but not of the network.
    let err = Netns::open("/proc/self/ns/uts".as_ref()).and_then(|netns| netns.enter()).unwrap_err();
    assert!(matches!(err, Error::NotNetns(_)), "{err:?}");
    assert!(started.elapsed() < Duration::from_secs(2), "nothing waits, not even for a fifo's writer");
    let node = TestNetns::create("node");
    in_netns(node.path(), || {
        let path = format!("/run/netns/{}", node.name());
        assert!(matches!(Netns::open(path.as_ref()), Err(Error::OwnNetns(_))), "the thread's own, by name");
    });
}

#[test]
fn the_lock_counts_across_paths_and_ends_with_its_holder() {
    let one = TestNetns::create("one");
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    symlink(one.path(), &link).unwrap();
    let (first, second) = (Netns::open(one.path()).unwrap(), Netns::open(&link).unwrap());
    let held = first.lock(Duration::ZERO).unwrap();
    let started = Instant::now();
    let err = second.lock(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(&err, Error::Locked { path, .. } if *path == link) && !err.is_gone(), "{err:?}");
    assert!((200..2000).contains(&started.elapsed().as_millis()));
    drop(held);
    // The thread that waited too long has had it, and has given it up.
    drop(second.lock(Duration::from_secs(5)).unwrap());
    let again = second.lock(Duration::from_secs(5)).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| first.lock(Duration::from_secs(5)).map(drop));
        drop(again);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn entering_takes_the_lock_and_another_process_holds_it_off() {
    let bed = Bed::new();
    bed.with(|_| {
        let wait = Duration::from_millis(50);
        let refused = in_netns(bed.node.path(), || System::new().unwrap().enter(bed.pod.path(), wait)).unwrap_err();
        assert!(matches!(refused, Error::Locked { .. }), "{refused:?}");
    });
    bed.with(|_| ());
    let mut holder = Command::new("flock");
    let mut child = holder.arg(bed.pod.path()).args(["sh", "-c", "echo held; read line"]);
    child = child.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
    let netns = Netns::open(bed.pod.path()).unwrap();
    assert!(matches!(netns.lock(Duration::from_millis(50)), Err(Error::Locked { .. })));
    drop(child.stdin.take());
    drop(netns.lock(Duration::from_secs(5)).unwrap());
    child.wait().unwrap();
}

/// Run by [`a_missing_capability_is_named`] in a process without one.
#[test]
#[ignore = "run by another test, in a process without a capability"]
fn capability_probe() {
    let netns = std::env::var("PROBE_NETNS").unwrap();
    let entered = System::new().and_then(|mut system| system.enter(netns.as_ref(), Duration::ZERO));
    println!("checked: {:?}; entered: {}", require_capabilities(), entered.unwrap_err());
}

#[test]
fn a_missing_capability_is_named() {
    require_capabilities().unwrap();
    let one = TestNetns::create("one");
    for (drop, name) in [("cap_net_admin", "CAP_NET_ADMIN"), ("cap_sys_admin", "CAP_SYS_ADMIN")] {
        let output = Command::new("capsh")
            .args([&format!("--drop={drop}"), "--", "-c", "exec \"$0\" --exact --ignored --nocapture capability_probe"])
            .arg(std::env::current_exe().unwrap())
            .env("PROBE_NETNS", one.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains(&format!("Err(Capability(\"{name}\"))")), "{text}");
        assert!(text.contains(&format!("entered: capability {name} is missing: run the container runtime")), "{text}");
    }
}

#[test]
fn a_file_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    for (mode, durability) in
        [(0o600, Durability::Synced), (0o644, Durability::Volatile), (0o600, Durability::Volatile)]
    {
        write_atomic(&path, b"content", mode, durability).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"content");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        assert_eq!(names(dir.path()), ["state.json"]);
    }
    // What cannot be replaced stays, and no temporary file either.
    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("inside"), "").unwrap();
    assert!(matches!(write_atomic(&taken, b"x", 0o600, Durability::Synced), Err(Error::File { .. })));
    assert_eq!(names(dir.path()), ["state.json", "taken"]);
    assert!(write_atomic(&dir.path().join("no/such/dir"), b"x", 0o600, Durability::Synced).is_err());
    assert!(write_atomic("/".as_ref(), b"x", 0o600, Durability::Synced).is_err());
    // A planted symlink is replaced, what it leads to is not written.
    let victim = dir.path().join("victim");
    fs::write(&victim, "mine").unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&victim, &path).unwrap();
    write_atomic(&path, b"new", 0o600, Durability::Synced).unwrap();
    assert_eq!((fs::read(&victim).unwrap(), fs::symlink_metadata(&path).unwrap().is_file()), (b"mine".to_vec(), true));
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_planted_link_in_the_temporary_files_place_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "mine").unwrap();
    let temporary = dir.path().join(".state.json.tmp");
    symlink(&victim, &temporary).unwrap();
    let written = write_atomic(&dir.path().join("state.json"), b"new", 0o600, Durability::Synced);
    assert_eq!(fs::read(&victim).unwrap(), b"mine", "{written:?}");
}

#[test]
fn a_leftover_temporary_file_takes_nothing_along() {
    let dir = tempfile::tempdir().unwrap();
    let temporary = dir.path().join(".state.json.tmp");
    fs::write(&temporary, "left by a crash, and longer than what comes").unwrap();
    write_atomic(&dir.path().join("state.json"), b"new", 0o600, Durability::Synced).unwrap();
    assert_eq!(fs::read(dir.path().join("state.json")).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["state.json"]);
}

#[test]
fn a_reader_never_sees_half() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    let contents = [b'a', b'b'].map(|byte| vec![byte; 300_000]);
    let stop = AtomicBool::new(false);
    write_atomic(&path, &contents[0], 0o600, Durability::Volatile).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = [0_u32; 2];
            while !stop.load(Ordering::Relaxed) {
                let text = read_trusted(&path).unwrap().unwrap().into_bytes();
                let which = contents
                    .iter()
                    .position(|content| *content == text)
                    .unwrap_or_else(|| panic!("half: {} bytes", text.len()));
                seen[which] += 1;
            }
            seen
        });
        for round in 0..400 {
            write_atomic(&path, &contents[round % 2], 0o600, Durability::Volatile).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        println!("{:?} reads of either content", reader.join().unwrap());
    });
    assert_eq!(names(dir.path()), ["state.json"]);
}

/// Two threads of one process write one file at the same time.
#[test]
fn writers_in_one_process_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    let contents = [b'a', b'b', b'c'].map(|byte| vec![byte; 200_000]);
    std::thread::scope(|scope| {
        for content in &contents {
            let path = &path;
            scope.spawn(move || (0..100).for_each(|_| drop(write_atomic(path, content, 0o600, Durability::Volatile))));
        }
        for _ in 0..300 {
            if let Ok(Some(text)) = read_trusted(&path) {
                assert!(contents.contains(&text.into_bytes()), "mixed or half content");
            }
        }
    });
    assert!(contents.contains(&fs::read(&path).unwrap()), "mixed or half content");
}

#[test]
fn only_roots_own_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    assert_eq!(read_trusted(&path), Ok(None));
    assert_eq!(read_trusted(&dir.path().join("no/such")), Ok(None));
    fs::write(&path, "text").unwrap();
    for (mode, trusted) in
        [(0o600, true), (0o644, true), (0o400, true), (0o664, false), (0o646, false), (0o622, false), (0o666, false)]
    {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        match read_trusted(&path) {
            Ok(text) => assert!(trusted && text.as_deref() == Some("text"), "{mode:o}"),
            Err(why) => {
                assert!(!trusted && why.contains(&format!("{mode:04o}")) && why.contains("chmod go-w"), "{why}")
            }
        }
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
    assert!(read_trusted(&path).unwrap_err().contains("12345"));
    std::os::unix::fs::chown(&path, Some(0), Some(12345)).unwrap();
    assert_eq!(read_trusted(&path), Ok(Some("text".to_owned())));
    // As Kubernetes mounts a ConfigMap.
    symlink(&path, dir.path().join("link")).unwrap();
    assert_eq!(read_trusted(&dir.path().join("link")), Ok(Some("text".to_owned())));
    fs::write(&path, b"\xff").unwrap();
    assert!(read_trusted(&path).unwrap_err().contains("UTF-8"));
    assert!(read_trusted(dir.path()).is_err() && read_trusted("/dev/null".as_ref()).is_err());
    let big = fs::File::create(dir.path().join("big")).unwrap();
    big.set_len(16 * 1024 * 1024 + 1).unwrap();
    assert!(read_trusted(&dir.path().join("big")).is_err());
}
