//! The split-lock shim, tested without the hypervisor: it must detect, and its record must be true.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use machine_tests::{Disk, check, check_eq, run, sector, trial};
use xtask::bochs::Bochs;
use xtask::console;
use xtask::events::{Address, Outcome, Truth};
use xtask::machine::{Exit, MachineConfig, RunOutcome, SldScope};
use xtask::shim;

/// Status of an emulator that the shim ended.
const SHIM_FAILED: i32 = 70;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("shim::detects_split_locks_while_bit_29_is_set", locks),
        trial("shim::a_machine_without_the_feature_takes_every_split_lock", locks_without_feature),
        trial("shim::the_machine_has_the_msrs", msrs),
        trial("shim::a_machine_without_the_feature_has_no_msrs", no_msrs),
        trial("shim::sees_instructions_that_bochs_decoded_twice", reentered),
        trial("shim::threads_have_their_own_msr", thread_scope),
        trial("shim::siblings_share_their_msr", core_scope),
        trial("shim::runs_are_repeatable", repeatable),
        trial("shim::an_unwritable_record_ends_the_run", unwritable_truth),
        trial("shim::a_full_disk_ends_the_run", full_disk),
        trial("shim::a_wrong_setting_ends_the_run", wrong_setting),
        trial("shim::another_program_is_refused", other_program),
    ]
}

fn run_program(program: &[u8], config: MachineConfig) -> Result<RunOutcome> {
    let outcome = run(&Disk::with(&sector::disk(program))?, config)?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::PoweredOff)?;
    Ok(outcome)
}

/// Where the program `locks` has its split locks, by the table at its end.
fn places() -> Vec<Address> {
    let (words, _) = sector::locks()[sector::locks().len() - 12..].as_chunks::<2>();
    let offsets = words.iter().map(|word| u64::from(u16::from_le_bytes(*word)));
    offsets.map(|offset| Address(sector::LOAD_ADDRESS + offset)).collect()
}

/// What the truth must be if all places are passed once for each outcome.
fn passes(outcomes: &[Outcome]) -> Vec<Truth> {
    let all = |&outcome| {
        places().into_iter().map(move |rip| Truth { cpu: 0, rip, cpl: 0, vmx: false, outcome })
    };
    outcomes.iter().flat_map(all).collect()
}

fn locks() -> Result<()> {
    let outcome = run_program(sector::locks(), MachineConfig::default())?;
    // The attempts with detection off; WRMSR; on; WRMSR; off. Of the three additions to one place two happened.
    let off = ".".repeat(12);
    let on = "F".repeat(6) + &".".repeat(6);
    let expected = format!("{off}.{on}.{off}00000002 ");
    check_eq(&outcome, "faults", outcome.serial.as_str(), expected)?;
    let expected = passes(&[Outcome::Taken, Outcome::Faulted, Outcome::Taken]);
    check_eq(&outcome, "truth", &outcome.truth, &expected)
}

fn locks_without_feature() -> Result<()> {
    let config = MachineConfig { sld: false, ..MachineConfig::default() };
    let outcome = run_program(sector::locks(), config)?;
    let off = ".".repeat(12);
    let expected = format!("{off}G{off}G{off}00000003 ");
    check_eq(&outcome, "faults", outcome.serial.as_str(), expected)?;
    check_eq(&outcome, "truth", &outcome.truth, &passes(&[Outcome::Taken; 3]))
}

fn msrs() -> Result<()> {
    let outcome = run_program(sector::msrs(), MachineConfig::default())?;
    // Both are read, 0xCF is 0x20; it cannot be written, 0x33 not with a reserved bit, and the refused
    // write did not switch detection on.
    check_eq(&outcome, "answers", outcome.serial.as_str(), "..00000020 GG.")
}

fn no_msrs() -> Result<()> {
    let config = MachineConfig { sld: false, ..MachineConfig::default() };
    let outcome = run_program(sector::msrs(), config)?;
    check(&outcome, outcome.serial.starts_with("GG") && outcome.serial.ends_with(" GG."), "answers")
}

fn reentered() -> Result<()> {
    let outcome = run_program(sector::reentered(), MachineConfig::default())?;
    check_eq(&outcome, "split locks", outcome.truth.len(), 10)
}

fn siblings(cpus: &str, scope: SldScope) -> Result<(RunOutcome, [bool; 2])> {
    let config = MachineConfig { cpus: cpus.parse()?, scope, ..MachineConfig::default() };
    let outcome = run_program(sector::siblings(), config)?;
    let faulted = outcome.serial.starts_with('F');
    let bit = outcome.serial.ends_with("20000000 ");
    check_eq(&outcome, "split locks", outcome.truth.len(), 1)?;
    let expected = if faulted { Outcome::Faulted } else { Outcome::Taken };
    check_eq(&outcome, "outcome", outcome.truth[0].outcome, expected)?;
    Ok((outcome, [faulted, bit]))
}

fn thread_scope() -> Result<()> {
    let (outcome, seen) = siblings("1:1:2", SldScope::Thread)?;
    check_eq(&outcome, "fault and bit on the other thread", seen, [false, false])
}

fn core_scope() -> Result<()> {
    let (outcome, seen) = siblings("1:1:2", SldScope::Core)?;
    check_eq(&outcome, "fault and bit on the other thread", seen, [true, true])?;
    // Two cores of one thread each share nothing.
    let (outcome, seen) = siblings("1:2:1", SldScope::Core)?;
    check_eq(&outcome, "fault and bit on the other core", seen, [false, false])
}

fn repeatable() -> Result<()> {
    let recorded = run_program(sector::timed(), MachineConfig::default())?;
    check_eq(&recorded, "split locks", recorded.truth.len(), 100)?;
    let again = run_program(sector::timed(), MachineConfig::default())?;
    check_eq(&again, "time of the same run", &again.serial, &recorded.serial)?;
    // The shim, its record and its profile take no machine time.
    let unrecorded = by_hand(sector::timed(), true, &[])?;
    check_eq(&recorded, "time without a record", &recorded.serial, &unrecorded.serial)?;
    let profiled = by_hand(sector::timed(), true, &[("SLD_SHIM_PROFILE", "profile")])?;
    check_eq(&recorded, "time with a profile", &recorded.serial, &profiled.serial)?;
    let bare = by_hand(sector::timed(), false, &[])?;
    check_eq(&recorded, "time without the shim", &recorded.serial, &bare.serial)
}

/// What a Bochs that was run by hand left.
struct ByHand {
    status: Option<i32>,
    said: String,
    serial: String,
}

/// Runs Bochs with or without the shim, and with another environment than the machine layer sets.
fn by_hand(program: &[u8], with_shim: bool, environment: &[(&str, &str)]) -> Result<ByHand> {
    let disk = Disk::with(&sector::disk(program))?;
    let directory = disk.path().with_extension("by-hand");
    fs::create_dir_all(&directory)?;
    let result = (|| {
        let bochs = Bochs::ensure()?;
        let image = disk.path().display().to_string();
        bochs.configure(
            &MachineConfig::default(),
            &directory,
            &image,
            ["serial", "events"],
            None,
        )?;
        let library = with_shim.then(shim::build).transpose()?;
        let mut command = bochs.command(library.as_deref());
        command.args(["-q", "-f", xtask::bochs::file::CONFIG]).current_dir(&directory);
        let output = console::capture(command.envs(environment.iter().copied()))?;
        Ok(ByHand {
            status: output.status.code(),
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
            serial: fs::read_to_string(directory.join("serial")).unwrap_or_default(),
        })
    })();
    fs::remove_dir_all(&directory)?;
    result
}

fn ends_with_message(variable: &str, value: &str, message: &str) -> Result<()> {
    let ByHand { status, said, .. } = by_hand(sector::locks(), true, &[(variable, value)])?;
    ensure!(status == Some(SHIM_FAILED), "status {status:?}: {said}");
    ensure!(said.contains("sld-shim: ") && said.contains(message), "{said}");
    Ok(())
}

fn unwritable_truth() -> Result<()> {
    ends_with_message("SLD_SHIM_TRUTH", "/nonexistent/truth", "/nonexistent/truth")?;
    ends_with_message("SLD_SHIM_PROFILE", "/nonexistent/profile", "/nonexistent/profile")
}

fn full_disk() -> Result<()> {
    ends_with_message("SLD_SHIM_TRUTH", "/dev/full", "No space left")
}

fn wrong_setting() -> Result<()> {
    ends_with_message("SLD_SHIM_SCOPE", "socket", "socket")?;
    ends_with_message("SLD_SHIM_SCOPE", "core", "SLD_SHIM_THREADS_PER_CORE")
}

fn other_program() -> Result<()> {
    let mut command = Command::new("true");
    command.env("LD_PRELOAD", shim::build()?).stdin(Stdio::null());
    let output = command.output().context("cannot run true")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(SHIM_FAILED), "{}: {said}", output.status);
    ensure!(said.contains("bx_cpu_array"), "{said}");
    Ok(())
}
