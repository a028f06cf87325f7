// Stands in for org.json, which Android has: what the example of docs/mobile.md asks of it.
package org.json

class JSONObject internal constructor(private val values: Map<String, Any?>) {
    @Suppress("UNCHECKED_CAST")
    constructor(text: String) : this(Reader(text).value() as Map<String, Any?>)

    fun getJSONObject(name: String) = JSONObject(map(values.getValue(name)))

    fun optJSONObject(name: String) = values[name]?.let { JSONObject(map(it)) }

    fun getJSONArray(name: String) = JSONArray(values.getValue(name) as List<*>)

    fun optJSONArray(name: String) = (values[name] as? List<*>)?.let { JSONArray(it) }

    fun getString(name: String) = values.getValue(name) as String

    fun optString(name: String) = values[name] as? String ?: ""

    fun getInt(name: String) = (values.getValue(name) as Double).toInt()

    fun optInt(name: String, otherwise: Int) = (values[name] as? Double)?.toInt() ?: otherwise

    fun getDouble(name: String) = values.getValue(name) as Double

    fun optDouble(name: String, otherwise: Double) = values[name] as? Double ?: otherwise

    fun getBoolean(name: String) = values.getValue(name) as Boolean

    fun optBoolean(name: String, otherwise: Boolean) = values[name] as? Boolean ?: otherwise

    @Suppress("UNCHECKED_CAST")
    private fun map(value: Any?) = value as Map<String, Any?>
}

class JSONArray internal constructor(private val values: List<*>) {
    fun length() = values.size

    fun getString(index: Int) = values[index] as String

    fun getLong(index: Int) = (values[index] as Double).toLong()

    fun optLong(index: Int, otherwise: Long) = (values[index] as? Double)?.toLong() ?: otherwise

    @Suppress("UNCHECKED_CAST")
    fun getJSONObject(index: Int) = JSONObject(values[index] as Map<String, Any?>)
}

private class Reader(private val text: String) {
    private var at = 0

    fun value(): Any? = when (peek()) {
        '{' -> buildMap { list('}') { val name = value() as String; expect(':'); put(name, value()) } }
        '[' -> buildList { list(']') { add(value()) } }
        '"' -> string()
        else -> when (val word = Regex("[-+.\\w]+").matchAt(text, at)!!.value.also { at += it.length }) {
            "null" -> null
            "true" -> true
            "false" -> false
            else -> word.toDouble()
        }
    }

    private fun peek(): Char {
        while (text[at].isWhitespace()) at++
        return text[at]
    }

    private fun expect(sign: Char) = check(peek() == sign).also { at++ }

    private fun list(end: Char, item: () -> Unit) {
        at++
        while (peek() != end) {
            item()
            if (peek() == ',') at++
        }
        at++
    }

    private fun string(): String {
        val out = StringBuilder()
        at++
        while (text[at] != '"') {
            if (text[at] != '\\') {
                out.append(text[at++])
                continue
            }
            val sign = text[at + 1]
            at += 2
            if (sign == 'u') out.append(text.substring(at, at + 4).toInt(16).toChar()).also { at += 4 }
            else out.append(mapOf('n' to '\n', 't' to '\t', 'r' to '\r', 'b' to '\b', 'f' to '\u000c')[sign] ?: sign)
        }
        at++
        return out.toString()
    }
}
