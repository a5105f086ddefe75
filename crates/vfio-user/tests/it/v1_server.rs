//! The migration region as a server makes it, used as the interface says: what it is, saving, loading.

use crate::common::*;
use crate::v1_user::*;
use airlift_core::{Errno, Interface};
use airlift_vfio_user::codec::{FeatureFlags, RegionInfoFlags, StateFormatFlags, feature};
use airlift_vfio_user::{DescriptionError, ServerOptions, V1Mapping, V1Section, V1SectionError};

fn section(size: u64, mapping: V1Mapping) -> V1Section {
    V1Section { size, mapping, whole_transactions: false }
}

fn mappings() -> Vec<V1Mapping> {
    vec![
        V1Mapping::Trapped,
        V1Mapping::Mapped,
        V1Mapping::Sparse(vec![(0, 4096)]),
        V1Mapping::Sparse(vec![(4096, 8192)]),
        // Not sorted, and what is trapped lies before, between and behind.
        V1Mapping::Sparse(vec![(12_288, 4096), (4096, 4096)]),
    ]
}

// V1-REGION
#[test]
fn the_region_is_described_by_its_type_and_by_what_can_be_mapped() {
    let all = RegionInfoFlags::READ | RegionInfoFlags::WRITE | RegionInfoFlags::CAPS;
    let mapped = all | RegionInfoFlags::MMAP;
    for (size, mapping, start, flags, areas) in [
        (5000, V1Mapping::Trapped, 32, all, vec![]),
        (5000, V1Mapping::Mapped, 4096, mapped, vec![(4096, 4096)]),
        (100, V1Mapping::Mapped, 32, all, vec![]),
        (
            16_384,
            V1Mapping::Sparse(vec![(8192, 4096), (0, 4096)]),
            4096,
            mapped,
            vec![(12_288, 4096), (4096, 4096)],
        ),
    ] {
        let served = serve_v1(section(size, mapping));
        let client = served.client();
        assert_eq!(client.info().unwrap().num_regions, 10);
        let info = client.region_info(REGION).unwrap();
        assert_eq!((info.size, info.flags, &info.areas), (start + size, flags, &areas));
        assert_eq!(info.fd.is_some(), !areas.is_empty());
        let user = User::new(client);
        assert_eq!(user.get(OFFSET).unwrap(), start);
        // The device was not asked for any of it.
        assert_eq!(served.control.log(), ["attach RUNNING"]);
    }
}

// V1-REGION
#[test]
fn the_type_stands_in_the_first_capability() {
    let served = serve_v1(section(8192, V1Mapping::Mapped));
    let mut stream = served.greeted();
    let mut ask = vec![0; 32];
    ask[0..4].copy_from_slice(&512_u32.to_ne_bytes());
    ask[8..12].copy_from_slice(&REGION.to_ne_bytes());
    stream.send(5, &ask);
    let (error, reply) = stream.receive();
    let word = |at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
    assert_eq!((error, reply.len()), (0, 80));
    assert_eq!((word(0), word(12)), (80, 32), "argsz, and where the capabilities begin");
    // Id 2 and version 1 in halves; the next one; type and subtype.
    assert_eq!((word(32), word(36), word(40), word(44)), (0x0001_0002, 48, 3, 1));
    assert_eq!((word(48), word(52), word(56)), (0x0001_0001, 0, 1), "the list of areas");
}

#[test]
fn features_of_the_other_interface_are_not_there_and_the_rest_is() {
    let served = serve_v1(section(8192, V1Mapping::Trapped));
    let client = served.client();
    let (get, set) = (FeatureFlags::GET, FeatureFlags::SET);
    for (index, operation) in [
        (feature::MIGRATION, get),
        (feature::MIG_DEVICE_STATE, get),
        (feature::MIG_DEVICE_STATE, set),
        (feature::MIG_DATA_SIZE, get),
        (feature::PRECOPY_INFO, get),
        (feature::MIG_PRECOPY_INFO_V2, set),
    ] {
        let error = client.device_feature(index, operation, &[0; 8], 64).unwrap_err();
        assert_eq!(error.errno, Some(Errno::ENOTTY), "feature {index:#x}");
    }
    for (index, operation) in [
        (feature::DMA_LOGGING_START, set),
        (feature::DMA_LOGGING_REPORT, get),
        (feature::STATE_FORMAT, get),
        (feature::MIGRATION_SOCKET, get),
    ] {
        assert!(client.has_feature(index, operation).unwrap(), "feature {index:#x}");
    }
    drop(client);
    let mut stream = served.greeted();
    for command in [17, 18] {
        stream.send(command, &[16, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(stream.receive().0, 95, "EOPNOTSUPP to command {command}");
    }
}

// V1-MIX, V1-WHOLE
#[test]
fn what_else_a_device_reads_stands_behind_the_name_of_its_format() {
    use StateFormatFlags as F;
    let flags = |interfaces: &[Interface], whole: Option<bool>| {
        let control = control();
        control.with(|s| {
            s.interfaces = interfaces.to_vec();
            s.v1 = whole.map(|whole_transactions| V1Section {
                size: 8192,
                mapping: V1Mapping::Trapped,
                whole_transactions,
            });
        });
        let flags = airlift_core::MigrationFlags::STOP_COPY | airlift_core::MigrationFlags::PRE_COPY;
        let served = serve_device(TestDevice { control, flags, mapping: None }, Default::default());
        let client = served.client();
        let data = client.device_feature(feature::STATE_FORMAT, FeatureFlags::GET, &[], 4096).unwrap();
        // Version, two counts, two versions, "test".
        assert_eq!((data.len(), &data[16..20]), (24, b"test".as_slice()));
        F::from_bits(u32::from_ne_bytes(data[20..].try_into().unwrap())).unwrap()
    };
    assert_eq!(flags(&[], None), F::empty());
    assert_eq!(flags(&[Interface::V1], None), F::READS_V1);
    assert_eq!(flags(&[Interface::V2], Some(true)), F::READS_V2 | F::WHOLE_TRANSACTIONS);
    assert_eq!(flags(&[], Some(false)), F::empty());
}

// V1-REGION, V1-AREAS
#[test]
fn a_section_that_cannot_be_is_told_to_whoever_serves_it() {
    use V1SectionError::{Area, Areas, Overlap, Size};
    let sparse = |areas: &[_]| section(16_384, V1Mapping::Sparse(areas.to_vec()));
    for (wrong, why, words) in [
        (section(0, V1Mapping::Trapped), Size(0), "a data section of 0 bytes"),
        (section((1 << 30) + 1, V1Mapping::Mapped), Size((1 << 30) + 1), "1 byte to 1 GiB"),
        (sparse(&[(12_288, 8192)]), Area { offset: 12_288, length: 8192 }, "not in the data section"),
        (sparse(&[(0, 4096), (100, 4096)]), Area { offset: 100, length: 4096 }, "0x64"),
        (sparse(&[(4096, 8192), (0, 8192)]), Overlap { first: 0, second: 4096 }, "overlap"),
        (sparse(&[(0, 4096); 4097]), Areas(4097), "4097 areas"),
    ] {
        assert_eq!(wrong.check(), Err(why));
        let error = refused(V1_FLAGS, Some(wrong), &ServerOptions::default());
        assert_eq!(cause(&error), &DescriptionError::Section(why));
        assert!(error.to_string().contains(words), "{error}");
    }
}

// V1-ARCS
#[test]
fn flags_that_the_interface_does_not_have_are_told_to_whoever_serves_them() {
    use airlift_core::MigrationFlags as F;
    for flags in [FULL, F::STOP_COPY, F::PRE_COPY, F::STOP_COPY | F::P2P] {
        let error = refused(flags, Some(section(8192, V1Mapping::Trapped)), &ServerOptions::default());
        assert_eq!(cause(&error), &DescriptionError::V1Flags(flags));
        assert!(error.to_string().contains("no P2P"), "{error}");
    }
}

// V1-WHOLE: a source with a larger section would be found in the middle of the load
#[test]
fn a_device_of_whole_transactions_is_not_served_where_that_cannot_be_said() {
    let silent = ServerOptions { extensions: false, ..Default::default() };
    let whole = V1Section { whole_transactions: true, ..section(8192, V1Mapping::Mapped) };
    let error = refused(V1_FLAGS, Some(whole), &silent);
    assert_eq!(cause(&error), &DescriptionError::WholeTransactions);
    assert!(error.to_string().contains("extensions"), "{error}");
    // One that takes any rounds has nothing to say.
    let served = serve_v1_with(section(8192, V1Mapping::Mapped), silent);
    assert_eq!(served.client().info().unwrap().num_regions, 10);
}

// V1-ARCS, V1-ORDER, V1-BITS
#[test]
fn each_arc_is_walked_in_the_order_of_its_bits_and_everything_else_is_refused() {
    let served = serve_v1(section(8192, V1Mapping::Trapped));
    let user = served.user();
    let arcs: [(u32, u32, &[&str]); 13] = [
        (RUNNING, STOPPED, &["RUNNING -> STOP"]),
        (STOPPED, RUNNING, &["STOP -> RUNNING"]),
        (RUNNING, RESUMING, &["RUNNING -> STOP", "STOP -> RESUMING"]),
        (STOPPED, RESUMING, &["STOP -> RESUMING"]),
        (RESUMING, RUNNING, &["RESUMING -> STOP", "STOP -> RUNNING"]),
        (RESUMING, STOPPED, &["RESUMING -> STOP"]),
        (RUNNING, PRE_COPY, &["RUNNING -> PRE_COPY"]),
        (RUNNING, STOP_COPY, &["RUNNING -> STOP", "STOP -> STOP_COPY"]),
        (STOPPED, STOP_COPY, &["STOP -> STOP_COPY"]),
        (PRE_COPY, STOP_COPY, &["PRE_COPY -> STOP_COPY"]),
        (PRE_COPY, RUNNING, &["PRE_COPY -> RUNNING"]),
        (STOP_COPY, STOPPED, &["STOP_COPY -> STOP"]),
        (STOP_COPY, RUNNING, &["STOP_COPY -> STOP", "STOP -> RUNNING"]),
    ];
    for from in [STOPPED, RUNNING, STOP_COPY, PRE_COPY, RESUMING] {
        for to in 0..8 {
            user.client.reset().unwrap();
            user.set(from).unwrap();
            served.control.take_log();
            let written = user.set(to);
            let log = served.control.take_log();
            let walked: Vec<_> = log.iter().filter(|l| l.contains("->")).map(String::as_str).collect();
            let what = format!("{from:03b} -> {to:03b}");
            match arcs.iter().find(|arc| (arc.0, arc.1) == (from, to)) {
                Some((.., way)) => {
                    written.unwrap();
                    assert_eq!((user.state(), walked.as_slice()), (to, *way), "{what}");
                }
                None => {
                    if from == to {
                        written.unwrap();
                    } else {
                        user.refused(&what, written);
                    }
                    assert_eq!((user.state(), walked.len()), (from, 0), "{what}");
                }
            }
        }
    }
}

// V1-CHUNK, V1-AREAS, V1-PENDING
#[test]
fn a_migration_keeps_its_chunks_in_every_layout_and_size() {
    // Sections of whole pages, and of a prime number of bytes, of which the last part is trapped.
    for size in [16_384, 20_011] {
        for mapping in mappings() {
            let source = serve_v1(section(size, mapping.clone()));
            let target = serve_v1(section(size, mapping.clone()));
            let (from, to) = (source.user(), target.user());
            assert_eq!(from.mapped() > 0, mapping != V1Mapping::Trapped);
            let early = pattern(50_000, 1);
            let late = pattern(33_333, 2);
            source.control.with(|s| {
                s.precopy.extend(&early);
                s.stop_copy.extend(&late);
            });

            from.set(PRE_COPY).unwrap();
            let mut chunks = from.save();
            from.set(STOP_COPY).unwrap();
            chunks.extend(from.save());
            from.set(STOPPED).unwrap();

            let sizes: Vec<_> = chunks.iter().map(Vec::len).collect();
            assert_eq!(sizes, source.control.with(|s| s.reads.clone()), "one read is one chunk");
            assert!(sizes.iter().any(|n| *n as u64 == size), "a chunk is as large as the section");
            to.set(RESUMING).unwrap();
            for chunk in &chunks {
                to.load(chunk).unwrap();
            }
            to.set(RUNNING).unwrap();
            let (loaded, writes) = target.control.with(|s| (s.loaded.clone(), s.writes.clone()));
            assert_eq!(writes, sizes, "one chunk is one write");
            assert_eq!(loaded, [early, late].concat(), "{size} {mapping:?}");
        }
    }
}

// V1-CHUNK
#[test]
fn chunks_are_what_the_device_gives_also_when_they_are_small() {
    let served = serve_v1(section(4099, V1Mapping::Mapped));
    let user = served.user();
    let data = pattern(1000, 3);
    served.control.with(|s| {
        s.stop_copy.extend(&data);
        s.read_limit = Some(7);
    });
    user.set(STOP_COPY).unwrap();
    let chunks = user.save();
    assert_eq!((chunks.len(), chunks[0].len(), chunks[142].len()), (143, 7, 6));
    assert_eq!(chunks.concat(), data);
    // A device with nothing, and one with a byte.
    user.set(RUNNING).unwrap();
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 0);
    served.control.with(|s| s.stop_copy.push_back(9));
    user.set(RUNNING).unwrap();
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.save(), [[9]]);
}

// V1-PENDING, V1-STABLE
#[test]
fn reading_a_field_again_changes_nothing() {
    let served = serve_v1(section(8192, V1Mapping::Trapped));
    let user = served.user();
    served.control.with(|s| {
        s.stop_copy.extend(pattern(10, 4));
        s.read_limit = Some(4);
    });
    user.set(STOP_COPY).unwrap();
    // Before anything was asked for there is no chunk.
    assert_eq!((user.get(OFFSET).unwrap(), user.get(SIZE).unwrap()), (32, 0));
    for _ in 0..3 {
        assert_eq!(user.get(PENDING).unwrap(), 10, "the chunk, and what is left behind it");
    }
    assert_eq!(user.get(SIZE).unwrap(), 0, "not published yet");
    for _ in 0..3 {
        assert_eq!((user.get(OFFSET).unwrap(), user.get(SIZE).unwrap()), (32, 4));
        assert_eq!(user.fetch().unwrap(), pattern(10, 4)[..4]);
    }
    assert_eq!(served.control.with(|s| s.reads.clone()), [4]);
    assert_eq!(user.get(PENDING).unwrap(), 6);
    assert_eq!(user.get(PENDING).unwrap(), 6);
    assert_eq!(served.control.with(|s| s.reads.clone()), [4, 4]);
    assert_eq!(user.save().concat(), pattern(10, 4)[4..]);
    for _ in 0..3 {
        assert_eq!(
            (user.get(PENDING).unwrap(), user.get(OFFSET).unwrap(), user.get(SIZE).unwrap()),
            (0, 32, 0)
        );
    }
}

// V1-PENDING, V1-HOLLOW
#[test]
fn what_comes_only_after_the_stop_is_pending_before_it_and_gives_nothing_yet() {
    let served = serve_v1(section(8192, V1Mapping::Mapped));
    let user = served.user();
    user.set(PRE_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 0);
    // What STOP_COPY would have is told, and cannot be fetched now: a pause.
    served.control.with(|s| s.stop_copy.extend([8; 5]));
    for _ in 0..3 {
        assert_eq!(user.get(PENDING).unwrap(), 5);
        assert!(user.fetch().unwrap().is_empty());
    }
    // The greater of the two beside the chunk: what is left for after the stop counts what is left before.
    served.control.with(|s| {
        s.precopy.extend([7; 6]);
        s.read_limit = Some(4);
    });
    assert_eq!(user.get(PENDING).unwrap(), 4 + (2 + 5));
    assert_eq!(user.save(), [vec![7; 4], vec![7; 2]]);
    assert_eq!(user.get(PENDING).unwrap(), 5);
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 5);
    assert_eq!(user.save(), [vec![8; 4], vec![8; 1]]);
}

// V1-OUTSTANDING
#[test]
fn a_chunk_that_was_not_taken_stays_over_the_stop() {
    let served = serve_v1(section(8192, V1Mapping::Mapped));
    let user = served.user();
    let (early, late) = (pattern(9000, 5), pattern(100, 6));
    served.control.with(|s| {
        s.precopy.extend(&early);
        s.stop_copy.extend(&late);
    });
    user.set(PRE_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 9100);
    let mut all = user.fetch().unwrap();
    assert_eq!(all.len(), 8192);
    // The state is written between the data and the next read of pending_bytes.
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.get(SIZE).unwrap(), 8192);
    assert_eq!(user.fetch().unwrap(), all);
    assert_eq!(user.get(PENDING).unwrap(), 908, "now it is taken");
    all.extend(user.save().concat());
    assert_eq!(all, [early.clone(), late].concat());

    // A chunk that was announced and not fetched stays too.
    user.set(RUNNING).unwrap();
    served.control.with(|s| s.precopy.extend(&early));
    user.set(PRE_COPY).unwrap();
    assert_eq!(user.get(PENDING).unwrap(), 9000);
    user.set(STOP_COPY).unwrap();
    assert_eq!(user.save().concat(), early);
}

// V1-ROUNDS
#[test]
fn a_chunk_larger_than_the_section_is_taken_in_rounds() {
    for mapping in [V1Mapping::Trapped, V1Mapping::Mapped] {
        let served = serve_v1(section(5003, mapping));
        let user = served.user();
        let data = pattern(16_000, 7);
        user.set(RESUMING).unwrap();
        user.refuses(RESUMING, "a round larger than the section", |u| {
            u.get(OFFSET)?;
            u.write_raw(SIZE, &5004_u64.to_ne_bytes())
        });
        for round in data.chunks(5003) {
            user.load(round).unwrap();
        }
        user.set(STOPPED).unwrap();
        let (loaded, writes) = served.control.with(|s| (s.loaded.clone(), s.writes.clone()));
        assert_eq!((loaded, writes), (data, vec![5003, 5003, 5003, 991]));
    }
}

#[test]
fn fields_of_a_device_that_neither_saves_nor_loads_say_nothing() {
    let served = serve_v1(section(8192, V1Mapping::Mapped));
    let user = served.user();
    served.control.with(|s| s.stop_copy.extend([1; 100]));
    for state in [RUNNING, STOPPED] {
        user.set(state).unwrap();
        let fields = [PENDING, OFFSET, SIZE].map(|field| user.get(field).unwrap());
        assert_eq!(fields, [0, 4096, 0], "in {state:03b}");
        user.refuses(state, "data in no session", |u| u.read_raw(4096 + 8191, 1));
    }
    assert_eq!(served.control.with(|s| s.reads.len()), 0);
}
