// What attention is about to read, for products to fetch into the cache while they compute: they
// leave most of the memory's bandwidth idle, and attention waits for nothing else.

namespace {

class Lookahead {
public:
    // The calling thread's share of the lines that a layer's keys take, and its values. The pages
    // are the same in all layers. `slot_bytes`: of one token's keys.
    void plan(const Part* parts, int64_t num_parts, const int32_t* pages, int64_t page_size,
              int64_t slot_bytes) {
        lines.clear();
        int64_t keys = 0;
        for (int64_t i = 0; i < num_parts; i++) keys += parts[i].end_key - parts[i].first_key;
        if (keys * slot_bytes > MOST_BYTES) return;
        for (int64_t i = omp_get_thread_num(); i < num_parts; i += omp_get_num_threads())
            plan_part(parts[i], pages, page_size, slot_bytes);
    }

    prefixd::Wanted of(const float* keys, const float* values) const {
        prefixd::Wanted wanted;
        wanted.lines = wanted.at = lines.data();
        wanted.end = wanted.lines + lines.size();
        wanted.array = (const char*)keys;
        wanted.other = (const char*)values;
        return wanted;
    }

private:
    static constexpr int64_t MOST_BYTES = 8 << 20;  // of a layer's keys: values are as many

    void plan_part(const Part& part, const int32_t* pages, int64_t page_size, int64_t slot_bytes) {
        for (int32_t key = part.first_key; key < part.end_key;) {
            const bool in_prefix = key < part.prefix_len;
            const int64_t from = in_prefix ? key : key - part.prefix_len;
            const int64_t last = (in_prefix ? part.prefix_len : part.end_key) - key;
            const int64_t offset = from % page_size;
            const int64_t count = std::min({page_size - offset, last, int64_t(part.end_key - key)});
            const int32_t* page = pages + (in_prefix ? part.prefix_page : part.own_page);
            const int64_t begin = (page[from / page_size] * page_size + offset) * slot_bytes;
            const int64_t end = begin + count * slot_bytes;
            for (int64_t line = begin / prefixd::LINE; line * prefixd::LINE < end; line++)
                lines.push_back(int32_t(line));
            key += int32_t(count);
        }
    }

    std::vector<int32_t> lines;
};

}  // namespace
