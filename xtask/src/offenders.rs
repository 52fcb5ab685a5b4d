//! Which instructions of the guests split locks: the table at the end of a run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::events::{Ac, Body, Event, Offender};
use crate::report::{self, align};
use crate::symbols::Symbols;
use crate::timeline::Clock;

/// The most rows of the table on a terminal.
const ROWS: usize = 20;

/// All that is known of them, the most frequent ones first. A vCPU that has ended has said it itself; of
/// one that has not, there are its events.
pub fn all(events: &[Event]) -> Vec<Offender> {
    let ended: BTreeSet<(&str, u32)> = events
        .iter()
        .filter_map(|event| match &event.body {
            Body::VcpuEnd { vm, vcpu, .. } => Some((&**vm, *vcpu)),
            _ => None,
        })
        .collect();
    let mut offenders: Vec<Offender> = Vec::new();
    for Event { tsc, body, .. } in events {
        match body {
            Body::Offender(offender) if ended.contains(&(&*offender.vm, offender.vcpu)) => {
                offenders.push(offender.clone());
            }
            Body::Ac(ac) if !ac.legacy && !ended.contains(&(&*ac.vm, ac.vcpu)) => {
                add(&mut offenders, ac, *tsc);
            }
            _ => {}
        }
    }
    offenders.sort_by_key(|offender| Reverse(offender.count));
    offenders
}

fn add(offenders: &mut Vec<Offender>, ac: &Ac, tsc: u64) {
    let is_it = |known: &Offender| {
        (&known.vm, known.vcpu, known.rip, known.cr3) == (&ac.vm, ac.vcpu, ac.rip, ac.cr3)
    };
    let index = offenders.iter().position(is_it).unwrap_or_else(|| {
        offenders.push(Offender {
            vm: ac.vm.clone(),
            vcpu: ac.vcpu,
            rip: ac.rip,
            cr3: ac.cr3,
            cpl: ac.cpl,
            bits: ac.bits,
            count: 0,
            missed: 0,
            verdicts: BTreeMap::new(),
            first: tsc,
            last: tsc,
            bytes: ac.bytes.clone(),
        });
        offenders.len() - 1
    });
    let offender = &mut offenders[index];
    offender.count += u64::from(ac.is_counted());
    *offender.verdicts.entry(ac.verdict.clone()).or_default() += 1;
    offender.last = tsc;
}

impl Offender {
    /// How often it split a lock, as far as that is known.
    pub fn times(&self) -> String {
        match self.missed {
            0 => self.count.to_string(),
            missed => format!("{} to {}", self.count, self.count + missed),
        }
    }

    /// The instruction, as an assembler for Intel's syntax would take it.
    pub fn instruction(&self) -> String {
        let bytes = &self.bytes.0;
        if bytes.is_empty() {
            return "cannot be read".to_owned();
        }
        if !matches!(self.bits, 16 | 32 | 64) {
            return self.bytes.to_string();
        }
        let decoder = Decoder::with_ip(self.bits, bytes, self.rip.0, DecoderOptions::NONE);
        let Some(instruction) = decoder.into_iter().next().filter(|first| !first.is_invalid())
        else {
            return self.bytes.to_string();
        };
        let mut text = String::new();
        let mut formatter = IntelFormatter::new();
        let options = formatter.options_mut();
        options.set_hex_prefix("0x");
        options.set_hex_suffix("");
        options.set_uppercase_hex(false);
        options.set_space_after_operand_separator(true);
        formatter.format(&instruction, &mut text);
        text
    }

    /// The guest's function that it is in. RIP is an address only where segments start at 0, which
    /// 16-bit code's as a rule do not.
    pub fn symbol(&self, symbols: &BTreeMap<String, Symbols>) -> Option<String> {
        let symbols = symbols.get(&self.vm).filter(|_| self.bits != 16)?;
        symbols.at(self.rip).map(|(name, offset)| format!("{name}+{offset:#x}"))
    }

    /// What was done about it.
    pub fn done(&self) -> String {
        report::verdicts(self.verdicts.iter().map(|(verdict, count)| (&**verdict, *count)))
    }
}

/// A table for the terminal; empty if nobody has split a lock that was seen.
pub fn table(offenders: &[Offender], symbols: &BTreeMap<String, Symbols>, clock: &Clock) -> String {
    if offenders.is_empty() {
        return String::new();
    }
    let unit = clock.unit();
    let heading = [
        "VM",
        "vCPU",
        "RIP",
        "CR3",
        "instruction",
        "function",
        "split locks",
        "verdict",
        &format!("first, {unit}"),
        &format!("last, {unit}"),
    ];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(offenders.iter().take(ROWS).map(|offender| {
        [
            offender.vm.clone(),
            offender.vcpu.to_string(),
            offender.rip.to_string(),
            offender.cr3.to_string(),
            offender.instruction(),
            offender.symbol(symbols).unwrap_or_else(|| "-".to_owned()),
            offender.times(),
            offender.done(),
            clock.time(offender.first),
            clock.time(offender.last),
        ]
    }));
    let mut table = align(&rows);
    if let Some(more @ 1..) = offenders.len().checked_sub(ROWS) {
        table += &format!("and {more} more: --report FILE.html shows them\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Bytes, parse_lines};

    const RUN: &str = r#"
        {"seq":0,"tsc":1000,"cpu":0,"event":"boot","version":"0.1.0","cpus":1,"sld":"warn","sld_source":"msr","firmware":"bios"}
        {"seq":1,"tsc":1100,"cpu":0,"event":"ac","vm":"a","vcpu":0,"rip":"0x100004","cr3":"0x1000","cpl":0,"bits":64,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"step","bytes":"f0830001"}
        {"seq":2,"tsc":1200,"cpu":0,"event":"ac","vm":"b","vcpu":0,"rip":"0x7","cr3":"0x0","cpl":0,"bits":16,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"throttle","bytes":"f0830701"}
        {"seq":3,"tsc":1300,"cpu":0,"event":"ac","vm":"b","vcpu":0,"rip":"0x7","cr3":"0x0","cpl":0,"bits":16,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"step","bytes":"f0830701"}
        {"seq":4,"tsc":1400,"cpu":0,"event":"ac","vm":"b","vcpu":0,"rip":"0x7","cr3":"0x0","cpl":3,"bits":16,"am":true,"ac":true,"virtual_bit":false,"legacy":true,"verdict":"inject","bytes":"f0830701"}
        {"seq":5,"tsc":1500,"cpu":0,"event":"offender","vm":"a","vcpu":0,"rip":"0x100004","cr3":"0x1000","cpl":0,"bits":64,"count":3,"missed":4,"verdicts":{"step":3,"warn":0},"first":1100,"last":1450,"bytes":"f0830001"}
        {"seq":6,"tsc":1600,"cpu":0,"event":"vcpu-end","vm":"a","vcpu":0,"counters":{}}
    "#;

    #[test]
    fn who_has_ended_says_it_and_of_others_there_are_events() {
        let events: Vec<Event> = parse_lines(RUN).unwrap();
        let offenders = all(&events);
        let [a, b] = offenders.as_slice() else { panic!("{offenders:?}") };
        assert_eq!((&*a.vm, a.count, a.missed), ("a", 3, 4));
        assert_eq!((&*b.vm, b.count, b.first, b.last), ("b", 1, 1200, 1300));
        assert_eq!(b.done(), "step, throttle");
        // Its end is missing: so what it said of itself is not all.
        let offenders = all(&events[..events.len() - 1]);
        assert!(offenders.iter().all(|offender| offender.count == 1), "{offenders:?}");
    }

    #[test]
    fn the_table_has_instruction_and_function() {
        let offenders = all(&parse_lines::<Event>(RUN).unwrap());
        let clock = Clock::of(1000, Some(1_000));
        let expected = "\
VM  vCPU  RIP       CR3     instruction               function  split locks  verdict         first, s  last, s
a   0     0x100004  0x1000  lock add dword ptr [rax], 1  -       3 to 7       step x3         0.100000  0.450000
b   0     0x7       0x0     lock add word ptr [bx], 1  -        1            step, throttle  0.200000  0.300000
";
        let words = |text: &str| {
            let lines =
                text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect());
            lines.collect::<Vec<Vec<_>>>()
        };
        assert_eq!(words(&table(&offenders, &BTreeMap::new(), &clock)), words(expected));
        assert_eq!(table(&[], &BTreeMap::new(), &clock), "");
        let many = vec![offenders[0].clone(); ROWS + 3];
        assert!(table(&many, &BTreeMap::new(), &clock).contains("and 3 more"));
        assert!(!table(&many[..ROWS], &BTreeMap::new(), &clock).contains("more"));
    }

    #[test]
    fn what_is_no_instruction_is_shown_as_bytes() {
        let mut offender = all(&parse_lines::<Event>(RUN).unwrap()).remove(0);
        offender.bytes = Bytes(vec![0xf0, 0x0f]);
        assert_eq!(offender.instruction(), "f00f");
        offender.bytes = Bytes(vec![]);
        assert_eq!(offender.instruction(), "cannot be read");
        (offender.bytes, offender.bits) = (Bytes(vec![0x90]), 0);
        assert_eq!(offender.instruction(), "90");
    }

    #[test]
    fn sixteen_bit_offsets_are_no_addresses() {
        let mut offender = all(&parse_lines::<Event>(RUN).unwrap()).remove(0);
        let symbols = Symbols::from([(0x10_0000, 8, "main")]);
        let symbols = BTreeMap::from([("a".to_owned(), symbols)]);
        assert_eq!(offender.symbol(&symbols), Some("main+0x4".to_owned()));
        offender.bits = 16;
        assert_eq!(offender.symbol(&symbols), None);
        (offender.bits, offender.vm) = (64, "b".to_owned());
        assert_eq!(offender.symbol(&symbols), None);
    }
}
